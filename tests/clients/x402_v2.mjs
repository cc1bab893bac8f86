// A top-up paid by @x402/fetch, which speaks x402 v2: terms in the PAYMENT-REQUIRED header, payment in
// PAYMENT-SIGNATURE. Left alone it pays at most $1, so its owner allows it the amount asked for.
//   FAREBOX_URL RPC_URL WALLET_KEY [TOPUP_USD]
import { ExactEvmScheme } from "@x402/evm";
import { decodePaymentResponseHeader, wrapFetchWithPayment, x402Client } from "@x402/fetch";
import { checkTopup, micro, run, topupUsd, url, usdcOf, wallet } from "./lib.mjs";

run(async () => {
  const account = wallet();
  const before = await usdcOf(account.address);
  const client = new x402Client()
    .register("eip155:8453", new ExactEvmScheme(account))
    .setSpendControls({ maxAmountPerPayment: `$${topupUsd()}` });
  const response = await wrapFetchWithPayment(fetch, client)(url("/v1/topup"), {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ amount: topupUsd() }),
    signal: AbortSignal.timeout(30_000),
  });
  const body = await response.json();
  const header = response.headers.get("payment-response");
  const receipt = header ? decodePaymentResponseHeader(header) : {};
  await checkTopup({ response, body, receipt, paidMicro: micro(topupUsd()), before });
});
