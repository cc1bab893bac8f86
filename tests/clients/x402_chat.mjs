// Chat bought without an account: by x402-fetch 1.2 (v1), or by @x402/fetch (v2), alone and under the OpenAI SDK.
//   x402_chat.mjs v1|v2      FAREBOX_URL RPC_URL WALLET_KEY MODEL
import { ExactEvmScheme } from "@x402/evm";
import { decodePaymentResponseHeader, wrapFetchWithPayment as wrapV2, x402Client } from "@x402/fetch";
import OpenAI from "openai";
import { createWalletClient, http } from "viem";
import { base } from "viem/chains";
import { wrapFetchWithPayment as wrapV1 } from "x402-fetch";
import { check, env, run, same, url, usdcOf, wallet } from "./lib.mjs";

const account = wallet();
const version = process.argv[2];
const paying =
  version === "v1"
    ? wrapV1(fetch, createWalletClient({ account, chain: base, transport: http(env("RPC_URL")) }))
    : wrapV2(fetch, new x402Client().register("eip155:8453", new ExactEvmScheme(account)));

const ask = (more) =>
  paying(url("/v1/chat/completions"), {
    method: "POST",
    headers: new Headers({ "content-type": "application/json" }),
    body: JSON.stringify({
      model: env("MODEL"),
      messages: [{ role: "user", content: "Hello" }],
      max_tokens: 64,
      ...more,
    }),
    signal: AbortSignal.timeout(30_000),
  });

run(async () => {
  const before = await usdcOf(account.address);

  const response = await ask({});
  const body = await response.json();
  check("the answer is 200", response.status === 200, { status: response.status, body });
  check("it has text", body.choices[0].message.content.length > 0, body);
  const charged = Number(response.headers.get("x-charged-usdc"));
  check("it was charged, and less than was paid", charged > 0 && charged < 10_000, charged);
  const receipt = decodePaymentResponseHeader(response.headers.get("payment-response"));
  same("the receipt's payer", receipt.payer, account.address);
  same("the wallet's USDC on the chain fell by", before - (await usdcOf(account.address)), 10_000);

  const stream = await ask({ stream: true });
  const text = await stream.text();
  check("a stream is paid for too", stream.status === 200 && text.endsWith("data: [DONE]\n\n"), text);
  check("its receipt comes with its head", stream.headers.get("payment-response") !== null);

  if (version === "v2") {
    // The SDK insists on a key: this one counts as none.
    const openai = new OpenAI({ apiKey: "x402", baseURL: url("/v1"), fetch: paying, maxRetries: 0 });
    const completion = await openai.chat.completions.create({
      model: env("MODEL"),
      messages: [{ role: "user", content: "Hello" }],
      max_tokens: 64,
    });
    check("the OpenAI SDK is answered", completion.choices[0].message.content.length > 0, completion);
  }
});
