// What is measured, and how: processor time and memory from /proc, requests by wrk, the disk by fdatasync.
import { execFileSync, spawn } from "node:child_process";
import { closeSync, fdatasyncSync, openSync, readFileSync, readdirSync, writeFileSync, writeSync } from "node:fs";
import { cpus, release, totalmem } from "node:os";
import { join } from "node:path";
import { directory, seconds } from "./house.mjs";

const CONNECTIONS = 32;
/** Of a subject that answers fewer requests a second than that. */
const SLOW_CONNECTIONS = 8;
const TICK_US = 1e6 / Number(execFileSync("getconf", ["CLK_TCK"]));
export const CORES = cpus().length;
/** More of the machine than this taken by others, and a measurement is made again. */
export const OTHERS_PERCENT = Number(process.env.BENCH_OTHERS_PERCENT ?? 5);
const TRIES = 5;
/** How long a round waits for others to be done, and measures again what they disturbed, in all. */
const PATIENCE_SECONDS = Number(process.env.BENCH_PATIENCE ?? 120);

const read = (path) => {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return "";
  }
};

/** A process's parent and the processor time it and its ended children used, in µs: proc(5). */
function stat(pid) {
  const text = read(`/proc/${pid}/stat`);
  if (!text) return undefined;
  const fields = text.slice(text.lastIndexOf(")") + 2).split(" ");
  const ticks = [11, 12, 13, 14].reduce((sum, at) => sum + Number(fields[at]), 0);
  return { parent: Number(fields[1]), us: ticks * TICK_US };
}

/** A process and all below it: { pid, us } of each. */
function tree(root) {
  const all = new Map();
  for (const name of readdirSync("/proc")) {
    const seen = /^\d+$/.test(name) && stat(name);
    if (seen) all.set(Number(name), seen);
  }
  const found = [];
  const add = (pid) => {
    if (all.has(pid)) found.push({ pid, us: all.get(pid).us });
    for (const [child, { parent }] of all) if (parent === pid) add(child);
  };
  add(root.pid);
  return found;
}

/** Processor time of a process and all below it, in µs. One that ends while it is read can be missed, so: thrice. */
export function cpuOf(root) {
  const read = () => tree(root).reduce((sum, { us }) => sum + us, 0);
  return root ? median([read(), read(), read()]) : 0;
}

/** Peak and present memory of a process and all below it in MB: the sum, so what they share counts for each. */
export function memory(root) {
  const sum = { peak: 0, now: 0 };
  for (const { pid } of tree(root)) {
    const status = read(`/proc/${pid}/status`);
    const mb = (name) => Number(status.match(new RegExp(`${name}:\\s+(\\d+) kB`))?.[1] ?? 0) / 1024;
    sum.peak += mb("VmHWM");
    sum.now += mb("VmRSS");
  }
  return sum;
}

/** Processor time that the machine's cores were busy, in µs. */
export function machine() {
  const [user, nice, system, , , irq, softirq, steal] = read("/proc/stat").split("\n")[0].split(/\s+/).slice(1).map(Number);
  return (user + nice + system + irq + softirq + steal) * TICK_US;
}

/** Percent of the machine that is busy while nothing of ours is asked. */
async function busyPercent() {
  const before = machine();
  await seconds(0.5);
  return ((machine() - before) / (0.5e6 * CORES)) * 100;
}

let patience = 0;
export const beginRound = () => (patience = PATIENCE_SECONDS);

export async function waitForQuiet() {
  while (patience > 0) {
    const begin = performance.now();
    if ((await busyPercent()) <= OTHERS_PERCENT) return;
    patience -= (performance.now() - begin) / 1000;
  }
}

/** Runs wrk once; throws where an answer was not 200, or there was none. */
async function wrk(subject, kind, keys, duration) {
  const [keyFile, bodyFile] = [join(directory, "keys"), join(directory, "body")];
  writeFileSync(keyFile, `${keys.join("\n")}\n`);
  writeFileSync(bodyFile, subject.workloads[kind].body);
  const script = new URL("chat.lua", import.meta.url).pathname;
  const args = ["-t2", `-c${subject.isSlow ? SLOW_CONNECTIONS : CONNECTIONS}`, `-d${duration}s`, "--latency", "--timeout", "10s", "-s", script, subject[kind]];
  const env = { ...process.env, BENCH_BODY: bodyFile, BENCH_KEYS: keyFile };
  const text = await output("wrk", args, { env }, duration + 30);
  const line = text.split("\n").find((l) => l.startsWith("RESULT "));
  if (!line) throw new Error(`wrk said no result: ${text}`);
  const [requests, us, wrong, broken, p50, p99, generatorUs] = line.split(" ").slice(1).map(Number);
  if (wrong + broken > 0 || requests === 0) {
    throw new Error(`${subject.name}, ${kind}: of ${requests} requests ${wrong} were not answered 200 and ${broken} not at all`);
  }
  return { requests, us, p50, p99, generatorUs };
}

/** A program's standard output, ended by its id if it takes too long. */
export function output(program, args, options, limitSeconds) {
  return new Promise((resolve, reject) => {
    const child = spawn(program, args, { stdio: ["ignore", "pipe", "inherit"], ...options });
    const timer = setTimeout(() => child.kill("SIGKILL"), limitSeconds * 1000);
    const stop = () => child.kill("SIGKILL");
    process.once("exit", stop);
    let text = "";
    child.stdout.on("data", (piece) => (text += piece));
    child.on("error", reject);
    child.on("close", (code) => {
      clearTimeout(timer);
      process.removeListener("exit", stop);
      code === 0 ? resolve(text) : reject(new Error(`${program} ended with ${code}`));
    });
  });
}

/**
 * Asks a subject for `duration` seconds after one of warming up; one that answers few in a second three times as long.
 * Where others took much of the machine meanwhile, again; what is kept is the least disturbed.
 */
export async function measure({ subject, kind, keys, upstream, postgres, duration }) {
  const slow = subject.isSlow ? 3 : 1;
  let best;
  for (let attempt = 0; attempt < TRIES; attempt++) {
    await waitForQuiet();
    const begin = performance.now();
    await wrk(subject, kind, keys, slow);
    const settled = await subject.settled?.();
    const before = snapshot(subject, upstream, postgres);
    const seen = await wrk(subject, kind, keys, duration * slow);
    const used = difference(snapshot(subject, upstream, postgres), before);
    const ours = (subject === upstream ? 0 : used.subject) + used.upstream + used.postgres + used.self + seen.generatorUs;
    if (subject.settled) {
      await seconds(0.3);
      const charged = (await subject.settled()) - settled;
      if (charged < seen.requests) throw new Error(`${subject.name}: ${seen.requests} answered and ${charged} charged`);
    }
    const result = {
      perSecond: (seen.requests / seen.us) * 1e6,
      requests: seen.requests,
      p50: seen.p50 / 1000,
      p99: seen.p99 / 1000,
      cpu: used.subject / seen.requests,
      postgresCpu: used.postgres / seen.requests,
      upstreamCpu: used.upstream / seen.requests,
      generatorCpu: seen.generatorUs / seen.requests,
      peak: memory(subject.child).peak,
      others: Math.max(0, ((used.machine - ours) / (used.wall * CORES)) * 100),
    };
    if (!best || result.others < best.others) best = result;
    if (best.others <= OTHERS_PERCENT || patience <= 0) break;
    patience -= (performance.now() - begin) / 1000;
  }
  return best;
}

function snapshot(subject, upstream, postgres) {
  const self = process.cpuUsage();
  return {
    subject: cpuOf(subject.child),
    upstream: cpuOf(upstream.child),
    postgres: cpuOf(postgres?.child),
    self: self.user + self.system,
    machine: machine(),
    wall: performance.now() * 1000,
  };
}

const difference = (after, before) => Object.fromEntries(Object.entries(after).map(([name, value]) => [name, value - before[name]]));

export const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];

/**
 * How long the disk takes to keep 4 KB, in ms: written over in place, as a write-ahead log is. On a busy machine this is
 * not the disk: who has waited for it then waits for a core, a tick of the scheduler (4 ms) or more. So `others` says how
 * busy the machine was, and no verdict may rest on it where that is much.
 */
export function fsyncTimes(count = 1000) {
  const before = { machine: machine(), self: process.cpuUsage(), wall: performance.now() };
  const file = openSync(join(directory, "fsync"), "w");
  const page = Buffer.alloc(4096, 1);
  for (let i = 0; i < 64; i++) writeSync(file, page, 0, page.length, i * page.length);
  fdatasyncSync(file);
  const times = [];
  for (let i = 0; i < count; i++) {
    writeSync(file, page, 0, page.length, (i % 64) * page.length);
    const begin = performance.now();
    fdatasyncSync(file);
    times.push(performance.now() - begin);
  }
  closeSync(file);
  times.sort((a, b) => a - b);
  const self = process.cpuUsage(before.self);
  const busy = machine() - before.machine - self.user - self.system;
  const others = Math.max(0, (busy / ((performance.now() - before.wall) * 1000 * CORES)) * 100);
  return { p50: times[Math.floor(count * 0.5)], p99: times[Math.floor(count * 0.99)], others };
}

/** The machine in a few lines. */
export function describe(extra) {
  const model = cpus()[0].model.trim();
  const disk = execFileSync("df", ["--output=fstype", directory], { encoding: "utf8" }).split("\n")[1].trim();
  const lines = [
    `${CORES} cores (${model}), ${Math.round(totalmem() / 2 ** 30)} GB, Linux ${release()}, files on ${disk}`,
    `${version("nginx", ["-v"])}; wrk ${version("wrk", ["-v"]).match(/wrk (\S+)/)?.[1] ?? ""}; ${CONNECTIONS} connections; Node ${process.version}`,
    ...extra,
  ];
  return lines.join("\n");
}

function version(program, args) {
  try {
    return execFileSync("sh", ["-c", `PATH=$PATH:/usr/sbin ${program} ${args.join(" ")} 2>&1 || true`], { encoding: "utf8" }).split("\n")[0];
  } catch {
    return program;
  }
}

/** A Markdown table. */
export function table(header, rows) {
  const line = (cells) => `| ${cells.join(" | ")} |`;
  return [line(header), line(header.map((_, i) => (i === 0 ? "---" : "---:"))), ...rows.map(line)].join("\n");
}
