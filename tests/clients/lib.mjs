// What the client programs share. Each takes everything from the environment and exits 0 only if every check held.
import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { isDeepStrictEqual } from "node:util";
import { createPublicClient, erc20Abi, http, parseUnits } from "viem";
import { privateKeyToAccount } from "viem/accounts";
import { base } from "viem/chains";
import { SiweMessage } from "siwe";

export const USDC = "0x833589fCD6eDb6E08f4c7C32D4f71b54bdA02913";

export function env(name, fallback) {
  const value = process.env[name] ?? fallback;
  if (value === undefined) throw new Error(`${name} is not set`);
  return value;
}

export const url = (path) => `${env("FAREBOX_URL")}${path}`;
export const wallet = () => privateKeyToAccount(env("WALLET_KEY"));
export const topupUsd = () => env("TOPUP_USD", "2");
export const micro = (usd) => Number(parseUnits(`${usd}`, 6));

/** A recording of silence as long as that: 16,000 samples of 16 bits a second. */
export function wav(ms) {
  const size = ms * 32;
  const file = Buffer.alloc(44 + size);
  file.write("RIFF", 0);
  file.writeUInt32LE(size + 36, 4);
  file.write("WAVEfmt ", 8);
  [16, 0x00010001, 16_000, 32_000, 0x00100002].forEach((value, i) => file.writeUInt32LE(value, 16 + 4 * i));
  file.write("data", 36);
  file.writeUInt32LE(size, 40);
  return file;
}

/** Prints the fact, or ends the program with it and what was seen instead. */
export function check(fact, holds, seen) {
  if (!holds) throw new Error(`${fact}: NO${seen === undefined ? "" : `, but ${JSON.stringify(seen)}`}`);
  console.log(`ok  ${fact}`);
}

export const same = (fact, seen, expected) =>
  check(`${fact}: ${JSON.stringify(expected)}`, JSON.stringify(seen) === JSON.stringify(expected), seen);

/** Runs one program to its end within `seconds`; a hanging one has failed. */
export function run(main, seconds = 90) {
  setTimeout(() => {
    console.error(`FAILED: not done after ${seconds} seconds`);
    process.exit(1);
  }, seconds * 1000).unref();
  main().then(
    () => process.exit(0),
    (error) => {
      console.error(`FAILED: ${error.stack ?? error}`);
      process.exit(1);
    },
  );
}

/** One request; answers { status, headers, body } with the body parsed if it is JSON. */
export async function call(method, path, { key, body, headers = {} } = {}) {
  const response = await fetch(url(path), {
    method,
    headers: {
      ...(key && { authorization: `Bearer ${key}` }),
      ...(body && { "content-type": "application/json" }),
      ...headers,
    },
    body: body && JSON.stringify(body),
    signal: AbortSignal.timeout(30_000),
  });
  const text = await response.text();
  let parsed = text;
  try {
    parsed = JSON.parse(text);
  } catch {
    // Not every answer is JSON; the check that reads it will say what it was.
  }
  return { status: response.status, headers: response.headers, body: parsed };
}

/** The wallet's USDC on the chain, in micro-USDC, as a number: no test holds 9 billion dollars. */
export async function usdcOf(address) {
  const chain = createPublicClient({ chain: base, transport: http(env("RPC_URL")) });
  return Number(
    await chain.readContract({ address: USDC, abi: erc20Abi, functionName: "balanceOf", args: [address] }),
  );
}

/** A SIWE message for this gateway, signed: { message, signature }. */
export async function signIn(account, more = {}) {
  const message = new SiweMessage({
    domain: new URL(url("/")).host,
    address: account.address,
    uri: url("/v1/auth/keys"),
    version: "1",
    chainId: 8453,
    issuedAt: new Date().toISOString(),
    ...more,
  }).prepareMessage();
  return { message, signature: await account.signMessage({ message }) };
}

/** What every paid top-up must show, whoever's client paid it. */
export async function checkTopup({ response, body, receipt, paidMicro, before }) {
  const account = wallet();
  check("the top-up is answered 200", response.status === 200, { status: response.status, body });
  same("credited_usdc", body.credited_usdc, paidMicro);
  same("wallet", body.wallet, account.address);
  check("tx_hash is a transaction hash", /^0x[0-9a-f]{64}$/.test(body.tx_hash), body);
  check("topup_id is a number", Number.isInteger(body.topup_id), body);
  check("balance_usdc holds the credit", body.balance_usdc >= paidMicro, body);
  check("the receipt header says success", receipt.success === true, receipt);
  same("the receipt's transaction", receipt.transaction, body.tx_hash);
  same("the receipt's payer", receipt.payer, account.address);
  same("the wallet's USDC on the chain fell by", before - (await usdcOf(account.address)), paidMicro);
}

/** What the files that docs/PROOFS.md shows export, as its readers have them. */
export async function fromTheDocuments(...files) {
  const directory = mkdtempSync(join(tmpdir(), "farebox-proofs-"));
  try {
    execFileSync("node", ["run_docs.mjs", "--files", "../../docs/PROOFS.md", directory]);
    const modules = await Promise.all(files.map((file) => import(join(directory, file))));
    return Object.assign({}, ...modules);
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

/**
 * Changes each byte of a text, one bit of it at a time, and has it checked: how many changes were seen, and which were
 * not. One that leaves the `meaning` as it is, is none.
 */
export async function changes(text, isGood, meaning) {
  const bytes = Buffer.from(text);
  const original = meaning(JSON.parse(text));
  const unseen = [];
  let seen = 0;
  for (let at = 0; at < bytes.length; at++) {
    const changed = Buffer.from(bytes);
    changed[at] ^= 1 << at % 7;
    try {
      const said = JSON.parse(changed);
      if (isDeepStrictEqual(meaning(said), original)) continue;
      if (await isGood(said)) unseen.push(`${at}: ${changed.subarray(Math.max(0, at - 20), at + 20)}`);
      else seen++;
    } catch {
      // No JSON any more, or no signature.
      seen++;
    }
  }
  return { seen, unseen };
}
