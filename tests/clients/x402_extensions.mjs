// What a 402 declares beside its terms, held against the packages that x402 publishes for it: bazaar describes the
// call, and a payment with a payment-identifier that is signed twice is taken once.
//   FAREBOX_URL RPC_URL WALLET_KEY MODEL
import { ExactEvmScheme } from "@x402/evm";
import { extractDiscoveryInfoFromExtension, validateDiscoveryExtension } from "@x402/extensions/bazaar";
import {
  appendPaymentIdentifierToExtensions,
  generatePaymentId,
  validatePaymentIdentifier,
} from "@x402/extensions/payment-identifier";
import { wrapFetchWithPayment, x402Client } from "@x402/fetch";
import { check, env, micro, run, same, url, usdcOf, wallet } from "./lib.mjs";

const account = wallet();
const question = (content) => ({
  method: "POST",
  body: JSON.stringify({ model: env("MODEL"), messages: [{ role: "user", content }], max_tokens: 64 }),
  signal: AbortSignal.timeout(30_000),
});

/** A client that knows nothing of the calls before it, and names its payment. */
function paying(id) {
  const client = new x402Client().register("eip155:8453", new ExactEvmScheme(account));
  client.onBeforePaymentCreation(async ({ paymentRequired }) => {
    appendPaymentIdentifierToExtensions(paymentRequired.extensions, id);
  });
  return wrapFetchWithPayment(fetch, client);
}

run(async () => {
  const refused = await fetch(url("/v1/chat/completions"), question("Hello"));
  const header = refused.headers.get("payment-required");
  const { extensions } = JSON.parse(Buffer.from(header, "base64"));
  const bazaar = validateDiscoveryExtension(extensions.bazaar);
  check("bazaar is what its schema says", bazaar.valid, bazaar);
  const { input } = extractDiscoveryInfoFromExtension(extensions.bazaar);
  same("it names the method", input.method, "POST");
  const named = validatePaymentIdentifier(extensions["payment-identifier"]);
  check("payment-identifier is declared", named.valid, named);
  check("the header leaves room for others", header.length < 8_000, header.length);

  // What bazaar shows can be sent as it is.
  const before = await usdcOf(account.address);
  const id = generatePaymentId();
  const shown = { ...question(""), body: JSON.stringify(input.body) };
  const first = await paying(id)(url("/v1/chat/completions"), shown);
  const answer = await first.text();
  check("the call that bazaar shows is answered", first.status === 200, { status: first.status, answer });
  const again = await paying(id)(url("/v1/chat/completions"), shown);
  same("signed again under the same name: the same answer", await again.text(), answer);
  same("and it says so", again.headers.get("idempotent-replayed"), "true");
  same("its receipt is the first payment's", again.headers.get("payment-response"), first.headers.get("payment-response"));
  const other = await paying(id)(url("/v1/chat/completions"), question("Something else"));
  same("another request under that name", [other.status, (await other.json()).error.code], [409, "payment_identifier_reused"]);
  same("one payment left the wallet", before - (await usdcOf(account.address)), micro("0.01"));
});
