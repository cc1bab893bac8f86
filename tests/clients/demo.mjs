// The main job, end to end, on this machine: a fresh wallet signs in, tops up with real USDC on a local chain, asks
// a model once and streams once, has a text embedded, a picture made and a recording written down through the OpenAI
// SDK, and every micro-USDC is accounted for. Exits 0 only then.
//
//   node demo.mjs path/to/farebox        OPENAI_API_KEY asks the real provider; KEEP=1 leaves everything up
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { ExactEvmScheme } from "@x402/evm";
import { wrapFetchWithPayment, x402Client } from "@x402/fetch";
import OpenAI, { toFile } from "openai";
import { generatePrivateKey, privateKeyToAccount } from "viem/accounts";
import { startAnvil, stop } from "./anvil.mjs";
import { deployUsdc, mintUsdc } from "./devchain.mjs";
import { call, check, same, signIn, url, usdcOf, wav } from "./lib.mjs";

const BINARY = process.argv[2];
const KEEP = process.env.KEEP === "1";
const REAL_PROVIDER = Boolean(process.env.OPENAI_API_KEY);
const MODEL = "openai/gpt-5-mini";
const FUNDS_USD = 20;
const TOPUP_USD = 5;

// The prices of the configuration below, in USD per million tokens at cost, which is pico-USD per token / 10^6.
const PRICE = { prompt: "0.15", completion: "0.60", cached: "0.075" };
// Of what is no conversation: USD for a million tokens and a call, for a picture, for a second.
const EMBEDDING = { prompt: "0.02", call: "0.0001" };
const PICTURE_USD = "0.011";
const SECOND_USD = "0.0001";
const MARKUP_BPS = 2000;

const directory = mkdtempSync(join(tmpdir(), "farebox-demo-"));
const children = [];

const title = (text) => console.log(`\n== ${text}`);
const dollars = (micro) => `$${(micro / 1e6).toFixed(6)}`;

async function demo() {
  title("A local Base with Circle's USDC, a model server, and Farebox");
  const house = await start();

  title("A fresh wallet signs in");
  const account = privateKeyToAccount(house.walletKey);
  const signed = await signIn(account, { statement: "Sign in to Farebox." });
  const created = await call("POST", "/v1/auth/keys", { body: { ...signed, label: "demo" } });
  check("the signature makes an API key", created.status === 201, created);
  const { key } = created.body;
  console.log(`    wallet ${account.address}\n    key    ${key.slice(0, 11)}…, shown once`);

  title("What a top-up costs");
  const unpaid = await call("POST", "/v1/topup", { body: { amount: TOPUP_USD } });
  check("without a payment: 402", unpaid.status === 402, unpaid);
  console.log(indent(JSON.stringify(unpaid.body, null, 2)));

  title(`Topping up $${TOPUP_USD} by x402: signed by the wallet, gas paid by the gateway`);
  const [walletBefore, treasuryBefore] = await Promise.all([usdcOf(account.address), usdcOf(house.payTo)]);
  const topup = await pay(account);
  check("credited in full", topup.credited_usdc === TOPUP_USD * 1e6 && topup.wallet === account.address, topup);
  console.log(`    transaction ${topup.tx_hash}`);
  same("the wallet paid on the chain", walletBefore - (await usdcOf(account.address)), TOPUP_USD * 1e6);
  same("the treasury received", (await usdcOf(house.payTo)) - treasuryBefore, TOPUP_USD * 1e6);

  title("Asking once, streaming once, with the OpenAI SDK");
  const openai = new OpenAI({ apiKey: key, baseURL: url("/v1"), maxRetries: 0, timeout: 120_000 });
  const charges = [await askOnce(openai), await streamOnce(openai)];

  title("An embedding, a picture, a transcription");
  charges.push(await embedOnce(openai), await paintOnce(openai), await listenOnce(openai));
  const spentMicro = charges.reduce((sum, charge) => sum + charge);

  title("The books");
  await readBooks(account.address, key, charges);
  await audit(house);

  if (KEEP) await stayUp(house, account, key);
  title("Stopping");
  await stop(house.gateway);
  same("the gateway's exit code", house.gateway.exitCode, 0);
  console.log(`\nEverything agreed: $${TOPUP_USD} in, ${dollars(spentMicro)} spent, the rest still the wallet's.`);
}

/** Starts the chain, the model server and the gateway, each awaited by the line it prints when it is ready. */
async function start() {
  const [relayerKey, treasuryKey, walletKey] = [generatePrivateKey(), generatePrivateKey(), generatePrivateKey()];
  const payTo = privateKeyToAccount(treasuryKey).address;

  const chain = await startAnvil();
  children.push(chain.child);
  process.env.RPC_URL = chain.url;
  await deployUsdc(chain.url, { relayer: privateKeyToAccount(relayerKey).address });
  await mintUsdc(chain.url, privateKeyToAccount(walletKey).address, FUNDS_USD * 1e6);
  console.log(`    chain    ${chain.url}, a wallet with $${FUNDS_USD}`);

  const modelUrl = REAL_PROVIDER ? "https://api.openai.com" : await startModelServer();
  console.log(`    models   ${modelUrl}`);

  // Sign-in messages name host and port, so the port must be known before the gateway starts.
  const address = `127.0.0.1:${await freePort()}`;
  process.env.FAREBOX_URL = `http://${address}`;
  const config = join(directory, "farebox.toml");
  writeFileSync(config, configuration({ address, rpc: chain.url, payTo, modelUrl }));
  // Nothing of the caller's own gateway may reach this one: any FAREBOX_ variable overrides the configuration.
  const others = Object.entries(process.env).filter(([name]) => !name.startsWith("FAREBOX_"));
  const secrets = {
    ...Object.fromEntries(others),
    FAREBOX_RELAYER_KEY: relayerKey,
    OPENAI_API_KEY: process.env.OPENAI_API_KEY || "sk-the-model-server-takes-any",
  };
  const gateway = launch(BINARY, ["serve", "--config", config], secrets);
  await line(gateway, (text) => text.includes(address));
  console.log(`    gateway  ${process.env.FAREBOX_URL}, its files in ${directory}`);
  return { gateway, config, secrets, payTo, walletKey };
}

async function startModelServer() {
  const server = launch(process.execPath, [new URL("model_server.mjs", import.meta.url).pathname]);
  return (await line(server, (text) => text.startsWith("ready "))).slice("ready ".length);
}

const configuration = ({ address, rpc, payTo, modelUrl }) => `\
listen = "${address}"
public_url = "http://${address}"
database_url = "sqlite://${join(directory, "farebox.db")}"

[payments]
network = "eip155:8453"
rpc_urls = ["${rpc}"]
pay_to = "${payTo}"

[pricing]
markup_bps = ${MARKUP_BPS}

[[providers]]
name = "openai"
kind = "openai"
base_url = "${modelUrl}/v1"
api_key_env = "OPENAI_API_KEY"

[[models]]
id = "${MODEL}"
provider = "openai"
upstream_model = "gpt-5-mini"
context_length = 128000
max_output_tokens = 16384
max_tokens_field = "max_completion_tokens"
price = { prompt = "${PRICE.prompt}", completion = "${PRICE.completion}", cached_prompt = "${PRICE.cached}" }

[[models]]
id = "openai/text-embedding-3-small"
kind = "embedding"
provider = "openai"
context_length = 8192
price = { prompt = "${EMBEDDING.prompt}", per_call = "${EMBEDDING.call}" }

[[models]]
id = "openai/gpt-image-1"
kind = "image"
provider = "openai"
price = { per_image = [{ size = "1024x1024", quality = "low", usd = "${PICTURE_USD}" }] }

[[models]]
id = "openai/whisper-1"
kind = "transcription"
provider = "openai"
price = { per_second = "${SECOND_USD}" }
`;

async function pay(account) {
  const client = new x402Client()
    .register("eip155:8453", new ExactEvmScheme(account))
    .setSpendControls({ maxAmountPerPayment: `$${TOPUP_USD}` });
  const response = await wrapFetchWithPayment(fetch, client)(url("/v1/topup"), {
    method: "POST",
    body: JSON.stringify({ amount: TOPUP_USD }),
    signal: AbortSignal.timeout(30_000),
  });
  const body = await response.json();
  check("paid", response.status === 200, { status: response.status, body });
  return body;
}

const question = (content) => ({ model: MODEL, messages: [{ role: "user", content }], max_tokens: 1024 });

/** Each answers the micro-USDC it must have cost, computed here from the usage the model reported. */
async function askOnce(openai) {
  const { data, response } = await openai.chat.completions
    .create(question("In one sentence: what is a wallet good for?"))
    .withResponse();
  console.log(indent(data.choices[0].message.content));
  const chargedMicro = chargeOf(data.usage);
  console.log(indent(`${data.usage.prompt_tokens} + ${data.usage.completion_tokens} tokens, ${dollars(chargedMicro)}`));
  same("the charge", Number(response.headers.get("x-charged-usdc")), chargedMicro);
  return chargedMicro;
}

async function streamOnce(openai) {
  const stream = await openai.chat.completions.create({
    ...question("And in another sentence: what is a fare box?"),
    stream: true,
    stream_options: { include_usage: true },
  });
  let usage;
  process.stdout.write("    ");
  for await (const chunk of stream) {
    process.stdout.write(chunk.choices[0]?.delta.content ?? "");
    usage = chunk.usage ?? usage;
  }
  console.log();
  check("the stream ended with its usage", usage !== undefined);
  const chargedMicro = chargeOf(usage);
  console.log(indent(`${usage.prompt_tokens} + ${usage.completion_tokens} tokens, ${dollars(chargedMicro)}`));
  return chargedMicro;
}

async function embedOnce(openai) {
  const { data, response } = await openai.embeddings
    .create({ model: "openai/text-embedding-3-small", input: "What is a fare box?", encoding_format: "float" })
    .withResponse();
  const costPico = BigInt(data.usage.prompt_tokens) * perMillion(EMBEDDING.prompt) + pico(EMBEDDING.call);
  return agreed(response, `a vector of ${data.data[0].embedding.length}`, costPico);
}

async function paintOnce(openai) {
  const ask = { model: "openai/gpt-image-1", prompt: "A fare box", size: "1024x1024", quality: "low" };
  const { data, response } = await openai.images.generate(ask).withResponse();
  const bytes = Buffer.from(data.data[0].b64_json, "base64").length;
  return agreed(response, `a picture of ${bytes} bytes`, BigInt(data.data.length) * pico(PICTURE_USD));
}

async function listenOnce(openai) {
  const file = await toFile(wav(2500), "silence.wav", { type: "audio/wav" });
  const { data, response } = await openai.audio.transcriptions
    .create({ model: "openai/whisper-1", file })
    .withResponse();
  return agreed(response, JSON.stringify(data.text), BigInt(data.usage.seconds) * pico(SECOND_USD));
}

/** Checks a charge against the cost that was worked out here. */
function agreed(response, what, costPico) {
  const chargedMicro = markedUp(costPico);
  console.log(indent(`${what}, ${dollars(chargedMicro)}`));
  same("the charge", Number(response.headers.get("x-charged-usdc")), chargedMicro);
  return chargedMicro;
}

/** USD as pico-USD, and USD for a million as pico-USD for one. */
const pico = (usd) => BigInt(Math.round(Number(usd) * 1e12));
const perMillion = (usd) => BigInt(Math.round(Number(usd) * 1e6));

/** The contract's formula, in integers: pico-USD, marked up, rounded up once to micro-USDC. */
function chargeOf({ prompt_tokens, completion_tokens, prompt_tokens_details }) {
  const cached = BigInt(prompt_tokens_details?.cached_tokens ?? 0);
  return markedUp(
    (BigInt(prompt_tokens) - cached) * perMillion(PRICE.prompt) +
      cached * perMillion(PRICE.cached) +
      BigInt(completion_tokens) * perMillion(PRICE.completion),
  );
}

function markedUp(costPico) {
  const divisor = 10_000n * 1_000_000n;
  return Number((costPico * BigInt(10_000 + MARKUP_BPS) + divisor - 1n) / divisor);
}

async function readBooks(wallet, key, charges) {
  const spentMicro = charges.reduce((sum, charge) => sum + charge);
  const receipts = await call("GET", "/v1/requests", { key });
  check("receipts can be read", receipts.status === 200, receipts);
  console.log(indent(JSON.stringify(receipts.body.data, null, 2)));
  const charged = receipts.body.data.map((receipt) => receipt.charged_usdc);
  same("the receipts' charges, newest first", charged, charges.toReversed());

  const usage = await call("GET", `/v1/usage/${wallet}`, { key });
  console.log(indent(JSON.stringify(usage.body, null, 2)));
  same("the balance", usage.body.balance_usdc, TOPUP_USD * 1e6 - spentMicro);
  same("what is locked", usage.body.locked_usdc, 0);
  same("what the key has spent", usage.body.keys[0].total_charged_usdc, spentMicro);

  const history = await call("GET", `/v1/topups/${wallet}`, { key });
  console.log(indent(JSON.stringify(history.body.topups, null, 2)));
  same("top-ups", history.body.topups.map((row) => row.amount_usdc), [TOPUP_USD * 1e6]);
}

async function audit({ config, secrets }) {
  const auditor = spawn(BINARY, ["audit", "--config", config], {
    env: secrets,
    stdio: ["ignore", "inherit", "inherit"],
  });
  const code = await new Promise((resolve, reject) => auditor.once("exit", resolve).once("error", reject));
  same("farebox audit's exit code", code, 0);
}

/** Leaves everything running until Ctrl-C, and says how to go on by hand. */
async function stayUp(house, account, key) {
  title("Everything stays up until Ctrl-C; in another terminal, from the root of the project:");
  console.log(`
export FAREBOX_URL=${process.env.FAREBOX_URL} RPC_URL=${process.env.RPC_URL} MODEL=${MODEL}
export API_KEY=${key}
export WALLET_KEY=${house.walletKey}

curl $FAREBOX_URL/v1/chat/completions -H "Authorization: Bearer $API_KEY" \\
  -d '{"model": "${MODEL}", "messages": [{"role": "user", "content": "Hello"}]}'
curl -N $FAREBOX_URL/v1/chat/completions -H "Authorization: Bearer $API_KEY" \\
  -d '{"model": "${MODEL}", "stream": true, "messages": [{"role": "user", "content": "Hello"}]}'
curl $FAREBOX_URL/v1/usage/${account.address} -H "Authorization: Bearer $API_KEY"
curl $FAREBOX_URL/v1/requests -H "Authorization: Bearer $API_KEY"

# Top up $2: ask for the terms, sign them as docs/CURL.md shows, pay.
page=$(mktemp -d) && node tests/clients/run_docs.mjs --files docs/CURL.md $page
curl -s "$FAREBOX_URL/v1/topup?x402=1" -d '{"amount": 2}' | node $page/sign.mjs > $page/payment
curl $FAREBOX_URL/v1/topup -d '{"amount": 2}' -H "X-Payment: $(cat $page/payment)"
`);
  clearTimeout(watchdog);
  await new Promise((resolve) => house.gateway.once("exit", resolve));
}

/** A child whose errors are shown and which is ended with this program. */
function launch(command, args, env = process.env) {
  const child = spawn(command, args, { env, stdio: ["ignore", "pipe", "inherit"] });
  children.push(child);
  return child;
}

/** The first line of a child's standard output that matches; the rest is read and dropped, so that it never blocks. */
function line(child, matches) {
  return new Promise((resolve, reject) => {
    child.once("error", reject);
    child.once("exit", (code) => reject(new Error(`${child.spawnfile} ended with ${code} before it was ready`)));
    createInterface({ input: child.stdout }).on("line", (text) => matches(text) && resolve(text));
  });
}

function freePort() {
  return new Promise((resolve, reject) => {
    const server = createServer().once("error", reject);
    server.listen(0, "127.0.0.1", () => {
      const { port } = server.address();
      server.close(() => resolve(port));
    });
  });
}

const indent = (text) => text.replace(/^/gm, "    ");

async function finish(code) {
  await Promise.all(children.map(stop));
  rmSync(directory, { recursive: true, force: true });
  process.exit(code);
}

// Long enough for a slow machine and a slow provider, and an end to anything that hangs.
const watchdog = setTimeout(() => {
  console.error("FAILED: the demo did not end in five minutes");
  finish(1);
}, 300_000);

for (const signal of ["SIGINT", "SIGTERM"]) process.once(signal, () => finish(KEEP ? 0 : 1));

demo().then(
  () => finish(0),
  (error) => {
    console.error(`\nFAILED: ${error.stack ?? error}`);
    finish(1);
  },
);
