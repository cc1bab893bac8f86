// The published reference facilitator (x402Facilitator of @x402/core with the exact scheme of @x402/evm) as an HTTP
// server, as its own examples make one: POST /verify, POST /settle, GET /supported.
//
//   RPC_URL      the chain
//   RELAYER_KEY  who pays the gas there
//   VERSION      1 or 2: the only version of x402 that is offered; both without it
//   AUTH         the Authorization header without which nobody is served
//   PORT         where to listen; a free port without it
//   WAIT_MS      how long it waits for a receipt before it answers settlement_pending
//
// POST /behave {"as": …} makes it do otherwise from then on:
//
//   healthy      what the published code does
//   lying        says that a payment is settled, and sends nothing
//   late         settles at once, and answers after 5 seconds
//   mistaken     settles, and names another transaction
//   refusing     sends nothing and says so, with the reason in `reason`
//
// GET /asked tells how often it was asked for what: {"settle": 1, "verify": 0, "supported": 2}, and the versions of the
// payloads in `versions`.
import { createServer } from "node:http";
import { setTimeout as sleep } from "node:timers/promises";
import { x402Facilitator } from "@x402/core/facilitator";
import { toFacilitatorEvmSigner } from "@x402/evm";
import { registerExactEvmScheme } from "@x402/evm/exact/facilitator";
import { ExactEvmSchemeV1 } from "@x402/evm/exact/v1/facilitator";
import { createWalletClient, http, publicActions } from "viem";
import { privateKeyToAccount } from "viem/accounts";
import { base } from "viem/chains";
import { env } from "./lib.mjs";

const NETWORK = "eip155:8453";
const ANSWERS_LATE_MS = 5_000;
const SOME_TRANSACTION = `0x${"5a".repeat(32)}`;

const account = privateKeyToAccount(env("RELAYER_KEY"));
const client = createWalletClient({
  account,
  chain: base,
  transport: http(env("RPC_URL")),
  pollingInterval: 50,
  cacheTime: 0,
}).extend(publicActions);
const signer = toFacilitatorEvmSigner(
  { ...client, address: account.address },
  { confirmationTimeoutMs: Number(env("WAIT_MS", "3000")) },
);

const facilitator = new x402Facilitator();
if (process.env.VERSION === "1") facilitator.registerV1(["base"], new ExactEvmSchemeV1(signer));
else registerExactEvmScheme(facilitator, { signer, networks: [NETWORK] });

let behaviour = { as: "healthy" };
const asked = { settle: 0, verify: 0, supported: 0, versions: [] };

function supported() {
  const offered = facilitator.getSupported();
  const wanted = Number(process.env.VERSION ?? 0);
  return { ...offered, kinds: offered.kinds.filter(({ x402Version }) => !wanted || x402Version === wanted) };
}

async function settle(payload, requirements) {
  const { network } = requirements;
  const payer = payload.payload.authorization.from;
  if (behaviour.as === "lying") return { success: true, transaction: SOME_TRANSACTION, network, payer };
  if (behaviour.as === "refusing") {
    return { success: false, errorReason: behaviour.reason, transaction: "", network, payer };
  }
  const settled = await facilitator.settle(payload, requirements);
  if (behaviour.as === "late") await sleep(ANSWERS_LATE_MS);
  if (behaviour.as === "mistaken") settled.transaction = SOME_TRANSACTION;
  return settled;
}

async function answer(method, path, body) {
  const { paymentPayload, paymentRequirements } = body ?? {};
  if (paymentPayload) asked.versions.push(paymentPayload.x402Version);
  switch (`${method} ${path}`) {
    case "GET /supported":
      asked.supported += 1;
      return supported();
    case "POST /verify":
      asked.verify += 1;
      return facilitator.verify(paymentPayload, paymentRequirements);
    case "POST /settle":
      asked.settle += 1;
      return settle(paymentPayload, paymentRequirements);
    case "POST /behave":
      behaviour = body;
      return behaviour;
    case "GET /asked":
      return asked;
    default:
      return undefined;
  }
}

async function read(request) {
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  const text = Buffer.concat(chunks).toString();
  return text ? JSON.parse(text) : undefined;
}

const server = createServer(async (request, response) => {
  const reply = (status, body) => {
    response.writeHead(status, { "content-type": "application/json" });
    response.end(JSON.stringify(body));
  };
  const isForPayments = ["/verify", "/settle", "/supported"].includes(request.url);
  if (isForPayments && process.env.AUTH && request.headers.authorization !== process.env.AUTH) {
    return reply(401, { error: "unauthorized" });
  }
  try {
    const body = await read(request);
    const answered = await answer(request.method, request.url, body);
    return answered === undefined ? reply(404, { error: "not found" }) : reply(200, answered);
  } catch (error) {
    console.error(error);
    return reply(500, { error: `${error.message}` });
  }
});

server.listen(Number(env("PORT", "0")), "127.0.0.1", () => {
  console.log(`ready http://127.0.0.1:${server.address().port}`);
});
