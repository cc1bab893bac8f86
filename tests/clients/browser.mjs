// The code of docs/DAPP.md in Chromium, on a page of another origin than the gateway's: a wallet signs in, tops up,
// asks, streams, pays for one call, calls on what is left, and signs out.
//   FAREBOX_URL RPC_URL WALLET_KEY MODEL [TOPUP_USD] [CHROMIUM] [SCREENSHOT]
// The wallet is new to the gateway, and has a dollar more than it tops up. SCREENSHOT is a file to write.
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";
import { chromium } from "playwright-core";
import { hexToString } from "viem";
import { check, env, micro, run, same, topupUsd, url, usdcOf, wallet } from "./lib.mjs";

const DAPP = fileURLToPath(new URL("../../docs/DAPP.md", import.meta.url));
const CHROMIUM_FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];
const HTML = `<!doctype html>
<meta charset="utf-8">
<title>A dapp</title>
<link rel="icon" href="data:,">
<style>
  body { font: 16px/1.4 sans-serif; margin: 2em }
  dt { font-weight: bold }
  dd { margin: 0 0 0.6em 1em; white-space: pre-wrap }
</style>
<h1>A dapp at <script>document.write(location.origin)</script></h1>
<p>Amounts are micro-USDC.</p>
<dl id="log"></dl>
<script src="/dapp.js"></script>`;

const account = wallet();
const model = env("MODEL");

run(async () => {
  const files = { "/": ["text/html", HTML], "/dapp.js": ["text/javascript", await bundle()] };
  const server = createServer(({ url: path }, response) => {
    const [type, content] = files[path] ?? [];
    response.writeHead(type ? 200 : 404, { "content-type": type ?? "text/plain" }).end(content);
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  const executablePath = env("CHROMIUM", "/usr/bin/chromium");
  // Its user data are in a directory of its own, which is deleted with it.
  const browser = await chromium.launch({ executablePath, headless: true, args: CHROMIUM_FLAGS, timeout: 60_000 });
  try {
    await visit(await browser.newPage(), `http://localhost:${server.address().port}`);
  } finally {
    await browser.close();
    server.close();
  }
});

async function visit(page, address) {
  const checkTraffic = await watch(page);
  const asked = await injectWallet(page);
  await page.addInitScript(defineStep);
  await page.goto(address);

  const connect = async () => {
    globalThis.wallet = await dapp.connect();
    return step("Connect", () => wallet.account.address);
  };
  same("the page's wallet", await page.evaluate(connect), account.address);
  await readTerms(page);

  const signIn = async () => (globalThis.session = await step("Sign in", () => dapp.signIn(wallet)));
  same("a signature begins a session of", (await page.evaluate(signIn)).wallet, account.address);

  const funds = await usdcOf(account.address);
  const paid = async () => funds - (await usdcOf(account.address));
  const topUp = (usd) => step(`Top up $${usd}`, () => dapp.topUp(wallet, usd));
  const topup = await page.evaluate(topUp, Number(topupUsd()));
  same("a top-up credits", topup.credited_usdc, micro(topupUsd()));
  same("the wallet has paid on the chain", await paid(), micro(topupUsd()));

  const ask = (model) => step("Ask", () => dapp.ask(session.session_token, model, "Hello"));
  const plain = checkAnswer("a call with the session", await page.evaluate(ask, model));
  same("the balance", plain.balance, micro(topupUsd()) - plain.charged);

  const stream = (model) =>
    step("Stream", async () => {
      const pieces = [];
      const keep = (piece) => piece && pieces.push(piece);
      const receipt = await dapp.stream(session.session_token, model, "Hello", keep);
      return { pieces: pieces.join("|"), charged: receipt.charged_usdc, outcome: receipt.outcome };
    });
  const streamed = await page.evaluate(stream, model);
  check("a stream comes in pieces", streamed.pieces.includes("|"), streamed);
  same("its receipt's outcome", streamed.outcome, "settled");
  check("and charge", streamed.charged > 0, streamed);

  const payForOneCall = (model) => step("Pay for one call", () => dapp.payForOneCall(wallet, model, "Hello"));
  const bought = checkAnswer("a call that is paid for", await page.evaluate(payForOneCall, model));
  check("PAYMENT-RESPONSE is readable", bought.paid, bought);
  const price = (await paid()) - micro(topupUsd());
  same("the wallet has paid for it on the chain", price, micro("0.01"));
  const left = plain.balance - streamed.charged + price - bought.charged;
  same("what the call did not cost is its balance", bought.balance, left);

  const callOnBalance = (model) => step("Call on the balance", () => dapp.callOnBalance(wallet, model, "Hello"));
  const signed = checkAnswer("a call that is signed for", await page.evaluate(callOnBalance, model));
  check("it has no PAYMENT-RESPONSE", !signed.paid, signed);
  same("the balance has paid", signed.balance, left - signed.charged);
  same("nothing more was paid on the chain", await paid(), micro(topupUsd()) + price);

  const signOut = () => step("Sign out", async () => (await dapp.signOut(session.session_token)).json());
  same("the session is revoked", await page.evaluate(signOut), { revoked: true });
  const refusal = await page.evaluate(ask, model).catch((error) => error.message);
  check("and is refused, 401", /401 .*revoked/.test(refusal), refusal);

  same("what the wallet was asked", asked, [
    "eth_requestAccounts",
    "wallet_switchEthereumChain",
    "personal_sign",
    "eth_signTypedData_v4",
    "eth_signTypedData_v4",
    "personal_sign",
  ]);
  await checkTraffic([
    "402 /v1/chat/completions",
    "402 /v1/topup",
    "402 /v1/chat/completions",
    "402 /v1/chat/completions",
    "401 /v1/chat/completions",
  ]);
  if (process.env.SCREENSHOT) await page.screenshot({ path: process.env.SCREENSHOT, fullPage: true });
}

/** What a script may read of the 402 that a call by nobody gets. */
async function readTerms(page) {
  const { type, status, headers, body } = await page.evaluate(
    async ({ address, model }) => {
      const question = JSON.stringify({ model, messages: [{ role: "user", content: "Hello" }] });
      const answer = await fetch(address, { method: "POST", body: question });
      const { type, status } = answer;
      return { type, status, headers: Object.fromEntries(answer.headers), body: await answer.json() };
    },
    { address: url("/v1/chat/completions"), model },
  );
  same("the gateway is of another origin", type, "cors");
  same("a page may read the status", status, 402);
  same("the body: terms of x402 version", body.x402Version, 1);
  check("PAYMENT-REQUIRED", headers["payment-required"]?.length > 0, headers);
  const terms = JSON.parse(Buffer.from(headers["payment-required"], "base64"));
  same("in it, terms of x402 version", terms.x402Version, 2);
  check("and a challenge", terms.extensions["sign-in-with-x"].info.nonce.length > 0, terms);
  check("X-Request-Id", /^req_/.test(headers["x-request-id"]), headers);
  check("but no header that is not exposed", !("access-control-expose-headers" in headers), headers);
}

function checkAnswer(call, answer) {
  check(`${call} is answered`, answer.text.length > 0, answer);
  check("X-Charged-Usdc is readable", answer.charged > 0, answer);
  check("X-Balance-Usdc is readable", answer.balance > 0, answer);
  return answer;
}

/** docs/DAPP.md's blocks of code, one after another, as a script that defines `dapp`. */
async function bundle() {
  const blocks = readFileSync(DAPP, "utf8").matchAll(/^```[jt]s\n(.*?)^```/gms);
  const contents = [...blocks].map(([, code]) => code).join("\n");
  check("docs/DAPP.md has code", contents.length > 0);
  const { outputFiles } = await build({
    stdin: { contents, loader: "ts", resolveDir: import.meta.dirname, sourcefile: "DAPP.md" },
    define: { "import.meta.env.VITE_FAREBOX_URL": JSON.stringify(url("")) },
    bundle: true,
    globalName: "dapp",
    write: false,
  });
  return outputFiles[0].text;
}

/** In the page: runs something, and shows what came of it. */
function defineStep() {
  const show = (tag, value) => {
    const lines = Object.entries(value).map(([name, member]) => `${name}: ${`${member}`.slice(0, 100)}`);
    const element = document.createElement(tag);
    element.textContent = typeof value === "object" ? lines.join("\n") : value;
    document.querySelector("#log").append(element);
  };
  globalThis.step = async (title, action) => {
    show("dt", title);
    try {
      const result = await action();
      show("dd", result);
      return result;
    } catch (error) {
      show("dd", `${error}`);
      throw error;
    }
  };
}

/** Puts a wallet (EIP-1193) into the page, whose key stays here. Answers the list of what it is asked, as it grows. */
async function injectWallet(page) {
  const asked = [];
  // As wallets do, it gives its address without a checksum, is on another chain, and signs for its own chain only.
  const address = account.address.toLowerCase();
  let chainId = "0x1";
  const mine = (named) => named.toLowerCase() === address || refuse(4100, `${named} is not an account of this wallet`);
  const methods = {
    eth_requestAccounts: () => [address],
    eth_accounts: () => [address],
    eth_chainId: () => chainId,
    wallet_switchEthereumChain: ([{ chainId: wanted }]) => {
      chainId = wanted;
      return null;
    },
    personal_sign: ([message, signer]) => mine(signer) && account.signMessage({ message: hexToString(message) }),
    eth_signTypedData_v4: ([signer, text]) => {
      const data = JSON.parse(text);
      if (Number(data.domain.chainId) !== Number(chainId)) refuse(-32602, `the wallet is on chain ${chainId}`);
      return mine(signer) && account.signTypedData(data);
    },
  };
  await page.exposeFunction("askWallet", async ({ method, params }) => {
    asked.push(method);
    try {
      return { result: await (methods[method] ?? (() => refuse(4200, `${method} is not supported`)))(params) };
    } catch ({ code = -32603, message }) {
      return { error: { code, message } };
    }
  });
  await page.addInitScript(() => {
    globalThis.ethereum = {
      request: async ({ method, params }) => {
        const { result, error } = await askWallet({ method, params });
        if (error) throw Object.assign(new Error(error.message), error);
        return result;
      },
    };
  });
  return asked;
}

function refuse(code, message) {
  throw Object.assign(new Error(message), { code });
}

/** Listens to what the page asks for and complains of. What it answers checks that, at the end. */
async function watch(page) {
  const place = (address) => (address.startsWith(url("/")) ? new URL(address).pathname : address);
  const refused = [];
  const complaints = [];
  page.on("response", (answer) => answer.ok() || refused.push(`${answer.status()} ${place(answer.url())}`));
  page.on("pageerror", (error) => complaints.push(`${error}`));
  page.on("requestfailed", async (request) => {
    const { errorText } = request.failure();
    // Chromium calls a stream aborted that is not to be stored, though a script has read all of it.
    const type = (await request.response())?.headers()["content-type"] ?? "";
    const read = errorText === "net::ERR_ABORTED" && type.startsWith("text/event-stream");
    if (!read) complaints.push(`${errorText} ${place(request.url())}`);
  });
  page.on("console", (message) => {
    const status = /the server responded with a status of (\d+)/.exec(message.text())?.[1];
    complaints.push(`${status ?? message.text()} ${place(message.location().url)}`);
  });

  // Only the debugger tells of preflights.
  const preflights = new Map();
  const debug = await page.context().newCDPSession(page);
  debug.on("Network.requestWillBeSent", ({ requestId, request: { method, headers } }) => {
    if (method === "OPTIONS") preflights.set(requestId, { for: headers["Access-Control-Request-Headers"] });
  });
  debug.on("Network.responseReceived", ({ requestId, response }) => {
    if (preflights.has(requestId)) preflights.get(requestId).status = response.status;
  });
  await debug.send("Network.enable");

  return async (expected) => {
    if (complaints.length < expected.length) {
      await page.waitForEvent("console", { predicate: () => complaints.length >= expected.length, timeout: 5_000 });
    }
    same("refusals", refused, expected);
    same("the console tells of these and of nothing else", complaints, expected);
    const seen = [...preflights.values()];
    check("each preflight was answered 200", seen.every(({ status }) => status === 200), seen);
    for (const name of ["authorization", "payment-signature", "sign-in-with-x", "x-stainless-lang"]) {
      check(`one was for ${name}`, seen.some((preflight) => preflight.for.split(",").includes(name)), seen);
    }
  };
}
