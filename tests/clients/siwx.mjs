// A wallet with a balance and no API key calls a model: @x402/extensions answers the challenge of the 402
// (sign-in-with-x), alone and under @x402/fetch, and nothing is paid on the chain.
//   FAREBOX_URL RPC_URL WALLET_KEY MODEL
import { ExactEvmScheme } from "@x402/evm";
import {
  createSIWxClientExtension,
  createSIWxPayload,
  encodeSIWxHeader,
  wrapFetchWithSIWx,
} from "@x402/extensions/sign-in-with-x";
import { wrapFetchWithPayment, x402Client } from "@x402/fetch";
import { call, check, env, run, same, url, usdcOf, wallet } from "./lib.mjs";

const question = { model: env("MODEL"), messages: [{ role: "user", content: "Hello" }], max_tokens: 64 };
// Without a credential: the first answer is a 402, and says how to sign in.
const request = () => ({
  method: "POST",
  headers: { "content-type": "application/json" },
  body: JSON.stringify(question),
  signal: AbortSignal.timeout(30_000),
});

async function balanceAfter(response) {
  const body = await response.json();
  check("the model answers, 200", response.status === 200, { status: response.status, body });
  same("X-Charged-Usdc", response.headers.get("x-charged-usdc"), `${body.usage.charged_usdc}`);
  return Number(response.headers.get("x-balance-usdc"));
}

run(async () => {
  const account = wallet();
  const before = await usdcOf(account.address);
  const first = await balanceAfter(await wrapFetchWithSIWx(fetch, account)(url("/v1/chat/completions"), request()));

  const client = new x402Client()
    .register("eip155:8453", new ExactEvmScheme(account))
    .registerExtension(createSIWxClientExtension({ signers: [account] }));
  const paying = wrapFetchWithPayment(fetch, client);
  const second = await balanceAfter(await paying(url("/v1/chat/completions"), request()));
  check("the balance has paid", second < first, { first, second });
  same("the wallet's USDC on the chain", await usdcOf(account.address), before);

  const refused = await fetch(url("/v1/chat/completions"), request());
  same("without the header", refused.status, 402);
  const terms = JSON.parse(Buffer.from(refused.headers.get("payment-required"), "base64"));
  const { info, supportedChains } = terms.extensions["sign-in-with-x"];
  const payload = await createSIWxPayload({ ...info, ...supportedChains[0] }, account, refused.url);
  const headers = { "SIGN-IN-WITH-X": encodeSIWxHeader(payload) };
  const once = await call("POST", "/v1/chat/completions", { headers, body: question });
  check("with the header alone, 200", once.status === 200, once);
  const again = await call("POST", "/v1/chat/completions", { headers, body: question });
  check("replayed, 401", again.status === 401, again);
  same("its code", again.body.error.code, "siwe_nonce_used");
});
