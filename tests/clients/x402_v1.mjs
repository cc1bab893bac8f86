// A top-up paid by x402-fetch 1.2, which speaks x402 v1: terms in the body of the 402, payment in X-PAYMENT.
// Left alone it pays at most $0.10, so its owner allows it the amount asked for.
//   FAREBOX_URL RPC_URL WALLET_KEY [TOPUP_USD]
import { createWalletClient, http } from "viem";
import { base } from "viem/chains";
import { decodeXPaymentResponse, wrapFetchWithPayment } from "x402-fetch";
import { checkTopup, env, micro, run, topupUsd, url, usdcOf, wallet } from "./lib.mjs";

run(async () => {
  const account = wallet();
  const before = await usdcOf(account.address);
  const signer = createWalletClient({ account, chain: base, transport: http(env("RPC_URL")) });
  const paidMicro = micro(topupUsd());
  const response = await wrapFetchWithPayment(fetch, signer, BigInt(paidMicro))(url("/v1/topup?x402=1"), {
    method: "POST",
    // A Headers object, since this client loses one when it pays: the body then arrives as text/plain.
    headers: new Headers({ "content-type": "application/json" }),
    body: JSON.stringify({ amount: Number(topupUsd()) }),
    signal: AbortSignal.timeout(30_000),
  });
  const body = await response.json();
  const header = response.headers.get("x-payment-response");
  const receipt = header ? decodeXPaymentResponse(header) : {};
  await checkTopup({ response, body, receipt, paidMicro, before });
});
