// Starts anvil, a local Ethereum node. Base's chain id is used because USDC's EIP-712 domain holds it, and one
// slot an epoch because then blocks become safe and final after one and two more, as tests of finality need.
import { spawn } from "node:child_process";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

export const CHAIN_ID = 8453;

/** The binary npm has placed, or ANVIL on a platform for which npm has none here. */
export function anvilBinary() {
  if (process.env.ANVIL) return process.env.ANVIL;
  try {
    return createRequire(import.meta.url).resolve("@foundry-rs/anvil-linux-amd64/bin/anvil");
  } catch {
    throw new Error("no anvil: run scripts/setup.sh, or set ANVIL to a foundry anvil 1.7 binary");
  }
}

/** Resolves to { url, child } when anvil listens, on a port the system chose unless `port` is given. */
export function startAnvil({ binary = anvilBinary(), port = 0, args = [] } = {}) {
  const child = spawn(
    binary,
    ["--host", "127.0.0.1", "--port", `${port}`, "--chain-id", `${CHAIN_ID}`, "--slots-in-an-epoch", "1", ...args],
    { stdio: ["ignore", "pipe", "inherit"] },
  );
  return new Promise((resolve, reject) => {
    child.once("error", reject);
    child.once("exit", (code) => reject(new Error(`anvil ended with ${code} before it listened`)));
    // The reader stays attached for anvil's whole life: a full pipe would stop it.
    createInterface({ input: child.stdout }).on("line", (line) => {
      const listening = /^Listening on (\S+)/.exec(line);
      if (listening) resolve({ url: `http://${listening[1]}`, child });
    });
  });
}

/** Ends a child process and waits until it is gone. */
export function stop(child) {
  if (child.exitCode !== null || child.signalCode !== null) return Promise.resolve();
  return new Promise((resolve) => {
    child.once("exit", resolve);
    child.kill("SIGTERM");
  });
}
