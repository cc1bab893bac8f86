// Runs a page of docs/ as its reader would: writes the files it shows, then runs its commands in one shell, from top
// to bottom, in a directory of their own, by a wallet that has USDC and has never been here. Exits 0 only if every
// command did what the page says.
//
//   run_docs.mjs PAGE               FAREBOX_URL RPC_URL WALLET_KEY MODEL [CLIENTS_PYTHON]
//   run_docs.mjs --files PAGE DIR   only writes the page's files to DIR, where they can be run
//
// With FAREBOX_BIN and FAREBOX_CONFIG the operator's command `farebox` is there as well.
//
// SHOW=1 prints what the commands printed, to copy into the page from.
//
// How a page is written, to what model_server.mjs answers and what that costs:
//
//   ```js sign.mjs           a file. Some command, or another file, must name it: nothing is shown that is not run
//   ```sh                    commands. The shell stops at the first that fails
//   ```text, json, console   what is printed; not run. Any other block without a name is an error
//
//   <!-- expect: 402 -->     beneath commands: their standard output has this text, or matches this /regex/. Commands
//                            that print anything need one
//   <!-- files of: CURL.md --> on a line of its own: the files that another page shows are there too
//   <!-- mine after: 402 --> beneath commands: the chain makes no block until they have printed this. Not for a chain
//                            that others use
import { spawn } from "node:child_process";
import { chmodSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { check, env } from "./lib.mjs";

const PATIENCE_SECONDS = 240;
const SHOWN = ["text", "json", "console"];
const PACKAGES = fileURLToPath(new URL("node_modules", import.meta.url));

/** A page's blocks in order: { line, language, file, text, expected, mineAfter }. */
function blocksOf(page) {
  const lines = readFileSync(page, "utf8").split("\n");
  const blocks = [];
  for (let i = 0; i < lines.length; i++) {
    if (!lines[i].startsWith("```")) continue;
    const [language, file] = lines[i].slice(3).trim().split(/\s+/);
    const end = lines.indexOf("```", i + 1);
    if (end < 0) throw new Error(`${page}:${i + 1}: the block does not end`);
    const block = { line: i + 1, language, file, text: lines.slice(i + 1, end).join("\n") + "\n", expected: [] };
    for (i = end; /^<!-- /.test(lines[i + 1]); i++) {
      const [, verb, what] = /^<!-- (expect|mine after): (.+) -->$/.exec(lines[i + 1]) ?? [];
      if (verb === "expect") block.expected.push(what);
      else if (verb) block.mineAfter = what;
      else throw new Error(`${page}:${i + 2}: neither "expect:" nor "mine after:"`);
    }
    blocks.push(block);
  }
  return blocks;
}

/** The files of the pages that a page refers to. */
function filesOfOthers(page) {
  const pages = [...readFileSync(page, "utf8").matchAll(/^<!-- files of: (\S+) -->$/gm)];
  return pages.flatMap(([, other]) => blocksOf(join(dirname(page), other)).filter(({ file }) => file));
}

function checkPage(page, blocks) {
  for (const { line, language, file, expected, mineAfter } of blocks) {
    const where = `${page}:${line}`;
    if (language === "sh" && !file) continue;
    if (expected.length || mineAfter) throw new Error(`${where}: only commands can be expected to print something`);
    if (file) {
      const others = blocks.filter((other) => other.file !== file && isRun(other));
      if (!others.some(({ text }) => isNamedIn(text, file))) throw new Error(`${where}: nothing runs ${file}`);
    } else if (!SHOWN.includes(language)) {
      throw new Error(`${where}: ${language || "a block without a language"} is neither run nor shown as output`);
    }
  }
  if (!blocks.some((block) => block.expected.length)) throw new Error(`${page} expects nothing`);
}

// Python imports a file by its name without the ending.
const isNamedIn = (text, file) =>
  text.includes(file) || (file.endsWith(".py") && text.includes(`from ${file.slice(0, -3)} import`));

const isRun = ({ language, file }) => Boolean(file) || language === "sh";

function writeFiles(blocks, directory) {
  for (const { file, text } of blocks) if (file) writeFileSync(join(directory, file), text);
  symlinkSync(PACKAGES, join(directory, "node_modules"));
}

const matches = (output, what) => {
  const [, pattern, flags] = /^\/(.+)\/([a-z]*)$/.exec(what) ?? [];
  return pattern ? new RegExp(pattern, flags).test(output) : output.includes(what);
};

/** One bash that runs what it is given, a piece at a time. */
class Shell {
  /** Ends a piece's output on both streams; no command prints it by chance. */
  #end = `\0${crypto.randomUUID()}\0`;
  #printed = { stdout: "", stderr: "" };
  #onPrint = () => {};

  constructor(directory, variables) {
    // In a group of its own, so that what it has started ends with it.
    this.child = spawn("bash", ["-euo", "pipefail", "-c", 'while read -r piece <&3; do . "$piece" 3<&-; done'], {
      cwd: directory,
      env: variables,
      detached: true,
      stdio: ["ignore", "pipe", "pipe", "pipe"],
    });
    this.gone = new Promise((done) => this.child.once("close", done));
    for (const stream of ["stdout", "stderr"]) {
      this.child[stream].setEncoding("utf8").on("data", (text) => {
        this.#printed[stream] += text;
        this.#onPrint(this.#printed);
      });
    }
  }

  /** Runs `text`, which is kept at `path`; answers what it printed, and whether all of it succeeded. */
  async run(path, text, onPrint) {
    const end = `printf '\\0%s\\0' ${this.#end.slice(1, -1)}`;
    writeFileSync(path, `${text}${end}\n${end} >&2\n`);
    this.#printed = { stdout: "", stderr: "" };
    const ended = new Promise((done) => {
      this.#onPrint = ({ stdout, stderr }) => {
        onPrint(stdout.split("\0")[0] + stderr.split("\0")[0]);
        if (stdout.endsWith(this.#end) && stderr.endsWith(this.#end)) done(true);
      };
    });
    this.child.stdio[3].write(`${path}\n`);
    const succeeded = await Promise.race([ended, this.gone.then(() => false)]);
    const { stdout, stderr } = this.#printed;
    return { succeeded, stdout: stdout.replace(this.#end, ""), stderr: stderr.replace(this.#end, "") };
  }

  async stop() {
    this.child.stdio[3].end();
    try {
      process.kill(-this.child.pid, "SIGKILL");
    } catch {
      // Nobody of the group is left.
    }
    await this.gone;
  }
}

/** Stops the chain's blocks; answers what makes it go on. */
async function stopMining() {
  const call = async (method, params) => {
    const response = await fetch(env("RPC_URL"), {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ jsonrpc: "2.0", id: 1, method, params }),
      signal: AbortSignal.timeout(10_000),
    });
    const { error } = await response.json();
    if (error) throw new Error(`${method}: ${error.message}`);
  };
  await call("evm_setAutomine", [false]);
  let going;
  return () => (going ??= call("evm_setAutomine", [true]).then(() => call("evm_mine", [])));
}

async function runPage(page, directory) {
  const blocks = blocksOf(page);
  checkPage(page, blocks);
  const home = join(directory, "reader");
  const bin = join(directory, "bin");
  for (const made of [home, bin]) mkdirSync(made);
  writeFiles([...filesOfOthers(page), ...blocks], home);
  // A virtual environment's python knows itself by its path: called by another name it would find no packages.
  const python = process.env.CLIENTS_PYTHON ?? fileURLToPath(new URL("../../build/venv/bin/python", import.meta.url));
  writeFileSync(join(bin, "python3"), `#!/bin/sh\nexec "${python}" "$@"\n`);
  chmodSync(join(bin, "python3"), 0o755);
  if (process.env.FAREBOX_BIN) {
    const secrets = ["FAREBOX_RELAYER_KEY", "UPSTREAM_KEY"].map((name) => `${name}='${env(name)}' `).join("");
    const command = `exec "${env("FAREBOX_BIN")}" --config "${env("FAREBOX_CONFIG")}" "$@"`;
    writeFileSync(join(bin, "farebox"), `#!/bin/sh\n${secrets}${command}\n`);
    chmodSync(join(bin, "farebox"), 0o755);
  }

  // What a reader has: nothing of this program's own environment that a page might lean on unsaid.
  const variables = { HOME: home, PATH: `${bin}:${process.env.PATH}`, LANG: "C.UTF-8" };
  for (const name of ["FAREBOX_URL", "RPC_URL", "WALLET_KEY", "MODEL"]) variables[name] = env(name);
  for (const name of ["NO_PROXY", "no_proxy"]) variables[name] = env(name, "");

  const shell = new Shell(home, variables);
  const watchdog = setTimeout(() => shell.stop(), PATIENCE_SECONDS * 1000);
  try {
    for (const block of blocks.filter(({ language, file }) => language === "sh" && !file)) {
      await runBlock(shell, page, block, directory);
    }
  } finally {
    clearTimeout(watchdog);
    await shell.stop();
  }
}

async function runBlock(shell, page, { line, text, expected, mineAfter }, directory) {
  const where = `${page}:${line}`;
  const mine = mineAfter && (await stopMining());
  let printed;
  let isMet = false;
  try {
    printed = await shell.run(join(directory, `${line}.sh`), text, (output) => {
      if (!mine || isMet || !matches(output, mineAfter)) return;
      isMet = true;
      // What fails here fails below once more.
      mine().catch(() => {});
    });
  } finally {
    await mine?.();
  }
  const { succeeded, stdout, stderr } = printed;
  const seen = () => `\n${text}\n--- printed\n${stdout}\n--- standard error\n${stderr}`;
  if (!succeeded) throw new Error(`${where}: a command failed, or all took over ${PATIENCE_SECONDS} s${seen()}`);
  if (mine && !isMet) throw new Error(`${where}: not printed: ${mineAfter}${seen()}`);
  for (const what of expected) if (!matches(stdout, what)) throw new Error(`${where}: not printed: ${what}${seen()}`);
  if (stdout && expected.length === 0) throw new Error(`${where}: prints, and nothing is expected of it${seen()}`);
  check(`${where} ${expected.map((what) => what.slice(0, 60)).join("  ")}`, true);
  if (process.env.SHOW) console.log(`${text}\n${stdout}\n${stderr}`);
}

async function main() {
  const args = process.argv.slice(2);
  if (args[0] === "--files") return writeFiles(blocksOf(args[1]), resolve(args[2]));
  const directory = mkdtempSync(join(tmpdir(), "farebox-docs-"));
  try {
    await runPage(args[0], directory);
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

main().catch((error) => {
  console.error(`FAILED: ${error.message}`);
  process.exitCode = 1;
});
