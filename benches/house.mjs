// Everything a benchmark starts: an upstream, nginx before it, the plain pass-through, PostgreSQL, gateways. All of it
// is in one directory, ends by its process id whatever happens, and leaves nothing behind.
import { execFileSync, spawn, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { chownSync, mkdirSync, mkdtempSync, openSync, readdirSync, rmSync, statSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { call, signIn, wallet } from "../tests/clients/lib.mjs";

const START_MS = 30_000;
export const WALLETS = Number(process.env.BENCH_WALLETS ?? 64);
/** Enough for every request of a run, and small enough for the books. */
const FUNDS_USD = 100_000;

export const seconds = (n) => new Promise((resolve) => setTimeout(resolve, n * 1000));

/** The two workloads: a small JSON answer, and a stream of eight chunks, the usage and the end. */
const asked = { messages: [{ role: "user", content: "Say something short." }], max_tokens: 64 };
export const WORKLOADS = {
  json: { body: JSON.stringify({ model: "bench/json", ...asked }), ends: (text) => JSON.parse(text).usage.total_tokens === 20 },
  sse: {
    body: JSON.stringify({ model: "bench/sse", ...asked, stream: true, stream_options: { include_usage: true } }),
    ends: (text) => text.trimEnd().endsWith("data: [DONE]") && text.includes('"total_tokens":20'),
  },
};

const usage = { prompt_tokens: 12, completion_tokens: 8, total_tokens: 20 };
const head = { id: "chatcmpl-bench", created: 1775563200, model: "bench" };
const words = ["A", " few", " words", " are", " enough", " for", " a", " test."];
const chunk = (more) => `data: ${JSON.stringify({ ...head, object: "chat.completion.chunk", ...more })}\n\n`;
const delta = (content, i) => {
  const last = i === words.length - 1;
  return chunk({ choices: [{ index: 0, delta: { content }, finish_reason: last ? "stop" : null }], usage: null });
};
export const ANSWERS = {
  json: JSON.stringify({
    ...head,
    object: "chat.completion",
    choices: [{ index: 0, message: { role: "assistant", content: words.join("") }, finish_reason: "stop" }],
    usage,
  }),
  sse: `${words.map(delta).join("")}${chunk({ choices: [], usage })}data: [DONE]\n\n`,
};
const TYPES = { json: "application/json", sse: "text/event-stream" };

export const directory = mkdtempSync(join(process.env.BENCH_DIR ?? tmpdir(), "farebox-bench-"));
const children = [];

/** Ends what was started, newest first. PostgreSQL ends at once on QUIT; its data goes as well. */
export function stopAll() {
  for (const { child, signal } of children.splice(0).reverse()) {
    if (child.exitCode === null && child.signalCode === null) child.kill(signal);
  }
}
process.on("exit", () => {
  stopAll();
  rmSync(directory, { recursive: true, force: true, maxRetries: 20, retryDelay: 100 });
});
for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"]) process.on(signal, () => process.exit(1));

/** Runs a benchmark to its end within a time, and says why where it has none. */
export function run(main, limitSeconds) {
  const fail = (error) => {
    console.error(`FAILED: ${error.stack ?? error}`);
    process.exit(1);
  };
  setTimeout(() => fail(`not done after ${limitSeconds} seconds`), limitSeconds * 1000).unref();
  main().then(() => process.exit(0), fail);
}

/** Starts a program whose errors go to a file. */
function launch(name, program, args, { signal = "SIGTERM", ...options } = {}) {
  const log = openSync(join(directory, `${name}.log`), "a");
  const child = spawn(program, args, { stdio: ["ignore", "pipe", log], ...options });
  child.on("error", (error) => console.error(`${program}: ${error.message}`));
  children.push({ child, signal });
  return child;
}

/** Waits for what a program says when it is ready. */
async function ready(child, name, says) {
  const lines = createInterface({ input: child.stdout });
  const said = (async () => {
    for await (const line of lines) if (line.includes(says)) return true;
    return false;
  })();
  if (await Promise.race([said, seconds(START_MS / 1000)])) return child;
  throw new Error(`${name} does not start: ${execFileSync("tail", ["-n5", join(directory, `${name}.log`)])}`);
}

async function until(name, probe) {
  const deadline = Date.now() + START_MS;
  for (;;) {
    try {
      if (await probe()) return;
    } catch {
      // Not there yet.
    }
    if (Date.now() > deadline) throw new Error(`${name} does not start`);
    await seconds(0.05);
  }
}

export async function freePort() {
  const server = createServer().listen(0, "127.0.0.1");
  await new Promise((resolve) => server.once("listening", resolve));
  const { port } = server.address();
  await new Promise((resolve) => server.close(resolve));
  return port;
}

async function nginx(name, servers, more = "") {
  const config = join(directory, `${name}.conf`);
  const temp = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map((kind) => `${kind}_temp_path ${directory}/${name}-${kind};`);
  writeFileSync(
    config,
    `daemon off; worker_processes 2; pid ${directory}/${name}.pid; error_log ${directory}/${name}.log;
${process.getuid() === 0 ? "user root;" : ""}
events { worker_connections 20000; }
http {
  access_log off; tcp_nodelay on; keepalive_requests 100000000; keepalive_timeout 300s;
  ${temp.join(" ")}
  ${more}
  ${servers}
}`,
  );
  const { PATH } = process.env;
  return launch(name, "nginx", ["-c", config], { env: { ...process.env, PATH: `${PATH}:/usr/sbin` } });
}

/** An upstream that answers at once: { child, json, sse } with an address for each workload. */
export async function startUpstream() {
  const ports = { json: await freePort(), sse: await freePort() };
  const server = (kind) => `server {
    listen 127.0.0.1:${ports[kind]} backlog=4096;
    location = /v1/chat/completions { default_type ${TYPES[kind]}; return 200 '${ANSWERS[kind]}'; }
  }`;
  const child = await nginx("upstream", server("json") + server("sse"));
  return serving("upstream", child, ports);
}

export async function startProxy(upstream) {
  const ports = { json: await freePort(), sse: await freePort() };
  const server = (kind) => `
  upstream ${kind} { server ${new URL(upstream[kind]).host}; keepalive 64; keepalive_requests 100000000; }
  server {
    listen 127.0.0.1:${ports[kind]} backlog=4096;
    location / { proxy_pass http://${kind}; proxy_http_version 1.1; proxy_set_header Connection ""; }
  }`;
  return serving("nginx", await nginx("nginx", server("json") + server("sse")), ports);
}

export async function startPassthrough(program, upstream) {
  const ports = { json: await freePort(), sse: await freePort() };
  const pair = (kind) => `127.0.0.1:${ports[kind]}=${upstream[kind]}`;
  const child = launch("passthrough", program, [pair("json"), pair("sse")]);
  await ready(child, "passthrough", "ready");
  return subject("pass-through", child, ports);
}

const subject = (name, child, ports) =>
  ({ name, child, json: `http://127.0.0.1:${ports.json}`, sse: `http://127.0.0.1:${ports.sse}`, keys: ["sk-none"] });

async function serving(name, child, ports) {
  const served = subject(name, child, ports);
  await until(name, async () => (await ask(served, "json")).status === 200);
  return served;
}

/** One request of a workload, as every client of the run sends it. */
export function ask(subject, kind) {
  return fetch(`${subject[kind]}/v1/chat/completions`, {
    method: "POST",
    headers: { "content-type": "application/json", authorization: `Bearer ${subject.keys[0]}` },
    body: WORKLOADS[kind].body,
    signal: AbortSignal.timeout(10_000),
  });
}

/** A PostgreSQL server as it is by default, durable: { child, database } */
export async function startPostgres() {
  const bin = process.env.POSTGRES_BIN || newestPostgres();
  const home = join(directory, "pg");
  mkdirSync(home);
  // The server refuses to be run by root.
  const account = process.getuid() === 0 ? unprivileged() : {};
  if (account.uid) {
    chownSync(home, account.uid, account.gid);
    execFileSync("chmod", ["755", directory]);
  }
  const options = { ...account, cwd: home };
  const data = join(home, "data");
  execFileSync(
    join(bin, "initdb"),
    ["--username=farebox", "--auth=trust", "--encoding=UTF8", "--locale=C", "--pgdata", data],
    { ...options, stdio: "ignore", timeout: 60_000 },
  );
  const settings = ["listen_addresses=", `unix_socket_directories=${home}`, "fsync=on", "synchronous_commit=on"];
  const child = launch("postgres", join(bin, "postgres"), ["-D", data, ...settings.flatMap((one) => ["-c", one])], {
    ...options,
    signal: "SIGQUIT",
  });
  const sql = (text) =>
    spawnSync(join(bin, "psql"), ["-h", home, "-U", "farebox", "-d", "postgres", "-qtAc", text], { ...options, timeout: 30_000 });
  await until("postgres", () => sql("SELECT 1").status === 0);
  const version = `${sql("SHOW server_version").stdout}`.trim();
  const database = (name) => {
    if (sql(`CREATE DATABASE ${name}`).status !== 0) throw new Error(`cannot create the database ${name}`);
    return `postgres:///${name}?host=${home}&user=farebox`;
  };
  return { child, database, version };
}

function newestPostgres() {
  const root = "/usr/lib/postgresql";
  const versions = readdirSync(root).map(Number).filter(Boolean);
  return join(root, `${Math.max(...versions)}`, "bin");
}

function unprivileged() {
  for (const name of ["postgres", "nobody"]) {
    const [uid, gid] = ["-u", "-g"].map((flag) => Number(spawnSync("id", [flag, name]).stdout));
    if (uid > 0) return { uid, gid };
  }
  throw new Error("there is no account without privileges to run PostgreSQL under");
}

/** A gateway with funded wallets and a key of each: { child, json, sse, keys, hotKeys, audit(), settled() } */
export async function startFarebox(name, program, databaseUrl, upstream) {
  const home = join(directory, name.replaceAll(/\W/g, "-"));
  mkdirSync(home);
  const [address, metrics] = [`127.0.0.1:${await freePort()}`, `127.0.0.1:${await freePort()}`];
  const config = join(home, "farebox.toml");
  writeFileSync(config, configuration({ address, metrics, database: databaseUrl ?? `sqlite://${join(home, "farebox.db")}`, upstream }));
  // Nothing of the caller's own gateway may reach this one: any FAREBOX_ variable overrides the configuration.
  const others = Object.entries(process.env).filter(([key]) => !key.startsWith("FAREBOX_"));
  const env = { ...Object.fromEntries(others), FAREBOX_RELAYER_KEY: privateKey("relayer") };
  const child = launch(name.replaceAll(/\W/g, "-"), program, ["serve", "--config", config], { env });
  await ready(child, name.replaceAll(/\W/g, "-"), address);

  const command = (...args) => {
    const done = spawnSync(program, [...args, "--config", config], { env, encoding: "utf8", timeout: 300_000 });
    if (done.status !== 0) throw new Error(`${name}: farebox ${args[0]}: ${done.stdout}${done.stderr}`);
    return done.stdout;
  };
  process.env.FAREBOX_URL = `http://${address}`;
  const keys = [];
  for (let i = 0; i <= WALLETS; i++) {
    process.env.WALLET_KEY = privateKey(`wallet ${i}`);
    const account = wallet();
    const made = await call("POST", "/v1/auth/keys", { body: await signIn(account) });
    if (made.status !== 201) throw new Error(`${name}: no key: ${JSON.stringify(made.body)}`);
    keys.push(made.body.key);
    command("wallet", "adjust", account.address, `${FUNDS_USD}`, "benchmark");
  }
  const gauge = async () => (await fetch(`http://${metrics}/metrics`)).text();
  /** Requests that were charged by the upstream's own report. */
  const settled = async () => {
    const lines = (await gauge()).split("\n").filter((l) => l.startsWith("farebox_holds_ended_total{") && l.includes('"settled"'));
    return lines.reduce((sum, l) => sum + Number(l.split(" ").at(-1)), 0);
  };
  const audit = () => command("audit");
  const url = `http://${address}`;
  return { name, child, json: url, sse: url, keys: keys.slice(1), hotKeys: keys.slice(0, 1), audit, settled, command };
}

/** A key of no value, the same in every run. */
const privateKey = (name) => `0x${createHash("sha256").update(`farebox bench ${name}`).digest("hex")}`;

const configuration = ({ address, metrics, database, upstream }) => `\
listen = "${address}"
public_url = "http://${address}"
database_url = "${database}"
metrics_listen = "${metrics}"

[payments]
network = "eip155:8453"
rpc_urls = ["http://127.0.0.1:9"]          # nobody listens there: no chain is needed to spend
pay_to = "0x70997970C51812dc3A010C7d01b50e0d17dc79C8"

[limits]                                   # counted, and far above what is asked
requests_per_minute = 1000000000
requests_per_day = 1000000000
concurrent_requests = 100000
unauthenticated_per_minute = 1000000

${["json", "sse"].map((kind) => providerAndModel(kind, upstream[kind])).join("\n")}`;

const providerAndModel = (kind, url) => `
[[providers]]
name = "${kind}"
base_url = "${url}/v1"
idle_timeout_s = 600

[[models]]
id = "bench/${kind}"
provider = "${kind}"
upstream_model = "bench"
context_length = 128000
max_output_tokens = 16384
price = { prompt = "0.15", completion = "0.60" }
`;

/** Which gateways to measure: BENCH_FAREBOX="name=path,name=path" sets builds side by side. */
export function builds(fallback) {
  const given = process.env.BENCH_FAREBOX ?? `farebox=${fallback}`;
  return given.split(",").map((pair) => {
    const [name, path] = pair.split("=");
    if (!statSync(path, { throwIfNoEntry: false })) throw new Error(`there is no ${path}`);
    return { name, path };
  });
}
