// Everything a benchmark starts: an upstream, nginx before it, the plain pass-through, PostgreSQL, gateways. All of it
// is in one directory, ends by its process id whatever happens, and leaves nothing behind.
import { execFileSync, spawn, spawnSync } from "node:child_process";
import { createHash, randomBytes } from "node:crypto";
import {
  chownSync, mkdirSync, mkdtempSync, openSync, readFileSync, readdirSync, rmSync, statSync, writeFileSync,
} from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { call, signIn, wallet } from "../tests/clients/lib.mjs";

const START_MS = 30_000;
/** Python reads some thousand modules, thrice. */
const LITELLM_START_MS = 120_000;
export const WALLETS = Number(process.env.BENCH_WALLETS ?? 64);
/** Enough for every request of a run, and small enough for the books. */
const FUNDS_USD = 100_000;

export const seconds = (n) => new Promise((resolve) => setTimeout(resolve, n * 1000));

const QUESTION = "Say something short.";
const WORDS = ["A", " few", " words", " are", " enough", " for", " a", " test."];
const head = { id: "chatcmpl-bench", created: 1775563200, model: "bench" };
const usageOf = (completion_tokens) => ({ prompt_tokens: 12, completion_tokens, total_tokens: 12 + completion_tokens });
const chunk = (more) => `data: ${JSON.stringify({ ...head, object: "chat.completion.chunk", ...more })}\n\n`;
const delta = (content, i, words) => {
  const last = i === words.length - 1;
  return chunk({ choices: [{ index: 0, delta: { content }, finish_reason: last ? "stop" : null }], usage: null });
};

/** A question whose answer is one JSON text. */
export const whole = (kind, words, question = QUESTION) => ({
  body: asked(kind, words, question),
  type: "application/json",
  answer: JSON.stringify({
    ...head,
    object: "chat.completion",
    choices: [{ index: 0, message: { role: "assistant", content: words.join("") }, finish_reason: "stop" }],
    usage: usageOf(words.length),
  }),
  ends: (text) => JSON.parse(text).usage.total_tokens === 12 + words.length,
});

/** A question whose answer is a stream: a chunk for each word, the usage and the end. */
export const streamed = (kind, words) => ({
  body: asked(kind, words, QUESTION, { stream: true, stream_options: { include_usage: true } }),
  type: "text/event-stream",
  answer: `${words.map(delta).join("")}${chunk({ choices: [], usage: usageOf(words.length) })}data: [DONE]\n\n`,
  ends: (text) => text.trimEnd().endsWith("data: [DONE]") && text.includes(`"total_tokens":${12 + words.length}`),
});

const asked = (kind, words, content, more) =>
  JSON.stringify({ model: `bench/${kind}`, messages: [{ role: "user", content }], max_tokens: 64 + words.length, ...more });

/** The two small workloads, each under the name that its model has. */
export const WORKLOADS = { json: whole("json", WORDS), sse: streamed("sse", WORDS) };

export const directory = mkdtempSync(join(process.env.BENCH_DIR ?? tmpdir(), "farebox-bench-"));
const children = [];

/** Ends what was started, newest first. PostgreSQL ends at once on QUIT; its data goes as well. */
export function stopAll() {
  for (const { child, signal, isGroup } of children.splice(0).reverse()) {
    if (isGroup) stopGroup(child);
    else if (child.exitCode === null && child.signalCode === null) child.kill(signal);
  }
}

/** Ends a process that was started in a group of its own, and all that it started: also where it is gone itself. */
function stopGroup(leader) {
  try {
    if (leader.pid) process.kill(-leader.pid, "SIGKILL");
  } catch {
    // None of them is left.
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
function launch(name, program, args, { signal = "SIGTERM", isGroup = false, ...options } = {}) {
  const log = openSync(join(directory, `${name}.log`), "a");
  const child = spawn(program, args, { stdio: ["ignore", "pipe", log], detached: isGroup, ...options });
  child.on("error", (error) => console.error(`${program}: ${error.message}`));
  children.push({ child, signal, isGroup });
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

async function until(name, probe, limitMs = START_MS) {
  const deadline = Date.now() + limitMs;
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
  client_body_buffer_size 1m;
  ${temp.join(" ")}
  ${more}
  ${servers}
}`,
  );
  const { PATH } = process.env;
  return launch(name, "nginx", ["-c", config], { env: { ...process.env, PATH: `${PATH}:/usr/sbin` } });
}

/** An upstream that answers at once: { child, workloads } and an address for each workload, under its name. */
export async function startUpstream(workloads = WORKLOADS) {
  const ports = await portsFor(workloads);
  const servers = Object.entries(workloads).map(([kind, { type, answer }]) => {
    writeFileSync(join(directory, `${kind}.answer`), answer);
    // What is too long for a directive is a file; nginx answers a POST with one only as the page of an error.
    return `server {
    listen 127.0.0.1:${ports[kind]} backlog=4096;
    location = /v1/chat/completions { ${
      answer.length < 4000 ? `default_type ${type}; return 200 '${answer}';` : `error_page 405 =200 /${kind}.answer; return 405;`
    } }
    location = /${kind}.answer { internal; root ${directory}; default_type ${type}; sendfile on; etag off; }
  }`;
  });
  const child = await nginx("upstream", servers.join("\n"));
  return serving(subject("upstream", child, ports, workloads));
}

/** nginx before an upstream, which keeps no answer in a file. */
export async function startProxy(upstream) {
  const { workloads } = upstream;
  const ports = await portsFor(workloads);
  const servers = Object.keys(workloads).map((kind) => `
  upstream ${kind} { server ${new URL(upstream[kind]).host}; keepalive 64; keepalive_requests 100000000; }
  server {
    listen 127.0.0.1:${ports[kind]} backlog=4096;
    location / {
      proxy_pass http://${kind}; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_max_temp_file_size 0;
    }
  }`);
  return serving(subject("nginx", await nginx("nginx", servers.join("\n")), ports, workloads));
}

export async function startPassthrough(program, upstream) {
  const { workloads } = upstream;
  const ports = await portsFor(workloads);
  const pairs = Object.keys(workloads).map((kind) => `127.0.0.1:${ports[kind]}=${upstream[kind]}`);
  const child = launch("passthrough", program, pairs);
  await ready(child, "passthrough", "ready");
  return subject("pass-through", child, ports, workloads);
}

async function portsFor(workloads) {
  const ports = {};
  for (const kind of Object.keys(workloads)) ports[kind] = await freePort();
  return ports;
}

function subject(name, child, ports, workloads) {
  const addresses = Object.entries(ports).map(([kind, port]) => [kind, `http://127.0.0.1:${port}`]);
  return { name, child, workloads, keys: ["sk-none"], ...Object.fromEntries(addresses) };
}

async function serving(subject, limitMs) {
  const [kind] = Object.keys(subject.workloads);
  await until(subject.name, async () => (await ask(subject, kind)).status === 200, limitMs);
  return subject;
}

const LITELLM = new URL("../build/bench-litellm/", import.meta.url).pathname;

/** The version of LiteLLM's gateway that scripts/setup.sh has installed, if it has. */
export function litellmVersion() {
  try {
    return readFileSync(join(LITELLM, ".installed"), "utf8").trim();
  } catch {
    return undefined;
  }
}

/** LiteLLM's gateway: two workers, no database, a key, and nothing else that is not its default. */
export async function startLitellm(upstream) {
  const { workloads } = upstream;
  const home = join(directory, "litellm");
  mkdirSync(home);
  const models = Object.keys(workloads).map((kind) => ({
    model_name: `bench/${kind}`,
    litellm_params: { model: "openai/bench", api_base: `${upstream[kind]}/v1`, api_key: "sk-none" },
  }));
  const config = join(home, "config.yaml");
  // JSON is YAML.
  writeFileSync(config, JSON.stringify({ model_list: models, litellm_settings: { telemetry: false } }));
  const [port, key] = [await freePort(), `sk-${randomBytes(24).toString("hex")}`];
  // Neither the caller's keys nor his home; and prices from the package, not from the network.
  const env = { PATH: process.env.PATH, HOME: home, LITELLM_MASTER_KEY: key, LITELLM_LOCAL_MODEL_COST_MAP: "True" };
  const options = ["--config", config, "--host", "127.0.0.1", "--port", `${port}`, "--num_workers", "2", "--telemetry", "False"];
  const log = openSync(join(home, "out.log"), "a");
  const child = launch("litellm", join(LITELLM, "bin/litellm"), options, { env, cwd: home, isGroup: true, stdio: ["ignore", log, log] });
  const ports = Object.fromEntries(Object.keys(workloads).map((kind) => [kind, port]));
  return serving({ ...subject("LiteLLM", child, ports, workloads), keys: [key], isSlow: true }, LITELLM_START_MS);
}

/** One request of a workload, as every client of the run sends it. */
export function ask(subject, kind) {
  return fetch(`${subject[kind]}/v1/chat/completions`, {
    method: "POST",
    headers: { "content-type": "application/json", authorization: `Bearer ${subject.keys[0]}` },
    body: subject.workloads[kind].body,
    signal: AbortSignal.timeout(10_000),
  });
}

/** Before anything is counted: the subject answers as the upstream does. */
export async function check(subject) {
  for (const [kind, { ends }] of Object.entries(subject.workloads)) {
    const answer = await ask(subject, kind);
    const text = await answer.text();
    if (answer.status !== 200 || !ends(text)) throw new Error(`${subject.name}, ${kind}: ${answer.status} ${text.slice(0, 500)}`);
  }
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

/** A gateway with funded wallets and a key of each: { child, keys, hotKeys, audit(), settled() } and its addresses. */
export async function startFarebox(name, program, databaseUrl, upstream) {
  const { workloads } = upstream;
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
  const ports = Object.fromEntries(Object.keys(workloads).map((kind) => [kind, new URL(`http://${address}`).port]));
  return { ...subject(name, child, ports, workloads), keys: keys.slice(1), hotKeys: keys.slice(0, 1), audit, settled, command };
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

${Object.keys(upstream.workloads).map((kind) => providerAndModel(kind, upstream[kind])).join("\n")}`;

const providerAndModel = (kind, url) => `
[[providers]]
name = "${kind}"
base_url = "${url}/v1"
idle_timeout_s = 600

[[models]]
id = "bench/${kind}"
provider = "${kind}"
upstream_model = "bench"
context_length = 1000000
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
