// Receipts, checked by the code of docs/PROOFS.md and by x402's own package; and none of them changed anywhere.
//   FAREBOX_URL RPC_URL WALLET_KEY MODEL
import { ExactEvmScheme } from "@x402/evm";
import {
  extractReceiptFromResponse,
  verifyReceiptMatchesOffer,
  verifyReceiptSignatureEIP712,
} from "@x402/extensions/offer-receipt";
import { wrapFetchWithPayment, x402Client } from "@x402/fetch";
import { call, changes, check, env, fromTheDocuments, run, same, signIn, url, wallet } from "./lib.mjs";

const account = wallet();

/** What an object says, as far as it is signed: letters of hex may be of either case to a reader of it. */
function meaning({ usage_reported, ...said }) {
  return { ...said, signature: { ...said.signature, value: said.signature.value.toLowerCase() } };
}

run(async () => {
  const { signerOf } = await fromTheDocuments("verify.mjs");
  const { receipt_signer: signer, receipt_signers: signers } = (await call("GET", "/v1/status")).body;
  same("the key that signs is among those that did", signers.map(({ address }) => address), [signer]);

  // A request that is paid for by itself.
  const client = new x402Client().register("eip155:8453", new ExactEvmScheme(account));
  const pay = wrapFetchWithPayment(fetch, client);
  const question = { model: env("MODEL"), messages: [{ role: "user", content: "Hello" }], max_tokens: 64 };
  const path = "/v1/chat/completions";
  const paid = await pay(url(path), { method: "POST", body: JSON.stringify(question) });
  check("the request is answered", paid.status === 200, await paid.text());
  const receipt = extractReceiptFromResponse(paid);
  check("x402's package finds its receipt", receipt?.format === "eip712", receipt);
  same("it is signed by the same key", (await verifyReceiptSignatureEIP712(receipt)).signer, signer);
  same("it names the payer", receipt.payload.payer, account.address);
  check("and the transaction", /^0x[0-9a-f]{64}$/.test(receipt.payload.transaction), receipt);
  const offer = { resourceUrl: url(path), network: "eip155:8453" };
  check("it matches what was offered", verifyReceiptMatchesOffer(receipt, offer, [account.address]), receipt);

  const streamed = await pay(url(path), { method: "POST", body: JSON.stringify({ ...question, stream: true }) });
  check("a stream is answered", streamed.status === 200 && (await streamed.text()).includes("[DONE]"));
  same("at its head nobody says that it was delivered", extractReceiptFromResponse(streamed) ?? null, null);

  const topup = await pay(url("/v1/topup"), { method: "POST", body: JSON.stringify({ amount: 1 }) });
  const credited = await topup.json();
  const ofTopup = extractReceiptFromResponse(topup);
  same("a top-up's is signed", (await verifyReceiptSignatureEIP712(ofTopup)).signer, signer);
  same("for its path", ofTopup.payload.resourceUrl, url("/v1/topup"));
  same("the top-up's own receipt is signed", await signerOf(credited.receipt), signer);

  // Read with a key.
  const made = await call("POST", "/v1/auth/keys", { body: await signIn(account) });
  const headers = { authorization: `Bearer ${made.body.key}` };
  const id = paid.headers.get("x-request-id");
  const text = await (await fetch(url(`/v1/requests/${id}`), { headers })).text();
  same("the request's receipt is signed", await signerOf(JSON.parse(text)), signer);
  const again = await (await fetch(url(`/v1/requests/${id}`), { headers })).text();
  check("and is the same again", again === text, again);
  const isGood = async (said) => (await signerOf(said)) === signer && said.signature.signer === signer;
  const ofRequest = await changes(text, isGood, meaning);
  same("no byte of it can be changed unseen", ofRequest.unseen, []);
  check(`${ofRequest.seen} changes were seen`, ofRequest.seen > 1000);

  const { topups } = (await call("GET", `/v1/topups/${account.address}`, { key: made.body.key })).body;
  same("all payments are there", topups.length, 3);
  for (const row of topups) same(`payment ${row.id} is signed`, await signerOf(row), signer);
  const ofPayment = await changes(JSON.stringify(topups[0]), isGood, meaning);
  same("no byte of it can be changed unseen", ofPayment.unseen, []);
  check(`${ofPayment.seen} changes were seen`, ofPayment.seen > 500);
});
