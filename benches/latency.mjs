// What a request waits for at a quiet pace: 200 a second, each counted from the moment it was due, beside what the same
// request takes without anything in between, and beside what the disk takes to keep 4 KB.
//
//   node latency.mjs target/release      BENCH_ROUNDS=3 BENCH_SECONDS=10 BENCH_RATE=200 BENCH_FAREBOX=name=path,…
import { join } from "node:path";
import { WORKLOADS, builds, run, startFarebox, startPassthrough, startPostgres, startProxy, startUpstream } from "./house.mjs";
import {
  CORES, OTHERS_PERCENT, beginRound, cpuOf, describe, fsyncTimes, machine, median, output, table, waitForQuiet,
} from "./measure.mjs";

const ROUNDS = Number(process.env.BENCH_ROUNDS ?? 3);
const DURATION = Number(process.env.BENCH_SECONDS ?? 10);
const RATE = Number(process.env.BENCH_RATE ?? 200);
const BIN = process.argv[2];

async function main() {
  const upstream = await startUpstream();
  const proxy = await startProxy(upstream);
  const passthrough = await startPassthrough(join(BIN, "examples/passthrough"), upstream);
  const postgres = await startPostgres();
  const gateways = [];
  for (const { name, path } of builds(join(BIN, "farebox"))) {
    gateways.push(await startFarebox(`${name} SQLite`, path, undefined, upstream));
    gateways.push(await startFarebox(`${name} PostgreSQL`, path, postgres.database(`bench_${gateways.length}`), upstream));
  }
  const subjects = [proxy, passthrough, ...gateways];
  console.log(`${describe([`PostgreSQL ${postgres.version}; ${RATE} requests/s, ${DURATION} s each`])}\n`);

  const rows = new Map();
  const disk = [];
  for (let round = 0; round < ROUNDS; round++) {
    beginRound();
    await waitForQuiet();
    disk.push(fsyncTimes());
    for (const kind of Object.keys(WORKLOADS)) {
      await waitForQuiet();
      const direct = await openLoop(upstream, kind, upstream, postgres);
      for (const subject of [...subjects.slice(round % subjects.length), ...subjects.slice(0, round % subjects.length)]) {
        await waitForQuiet();
        const seen = await openLoop(subject, kind, upstream, postgres);
        const added = {
          p50: seen.p50 - direct.p50,
          p99: seen.p99 - direct.p99,
          others: Math.max(seen.others, direct.others),
        };
        const key = `${kind === "json" ? "JSON" : "SSE"} ${subject.name}`;
        rows.set(key, [...(rows.get(key) ?? []), added]);
      }
    }
  }
  for (const gateway of gateways) gateway.audit();

  // The strictest round decides what one fsync may take: a disk is never slower for being left alone.
  const fsync = { p50: Math.min(...disk.map((one) => one.p50)), p99: Math.min(...disk.map((one) => one.p99)) };
  const allowed = { p50: 0.5 + fsync.p50, p99: 2 + fsync.p99 };
  const each = (rounds, name, digits = 2) => rounds.map((one) => one[name].toFixed(digits)).join(", ");
  console.log(`fdatasync of 4 KB, each round: p50 ${each(disk, "p50")} ms, p99 ${each(disk, "p99")} ms, others ${each(disk, "others", 0)} %`);
  const verdict = (rounds) => {
    if ([...rounds, ...disk].some((one) => one.others > OTHERS_PERCENT)) return "no verdict: the machine was busy";
    return ["p50", "p99"].every((name) => median(rounds.map((one) => one[name])) <= allowed[name]) ? "met" : "not met";
  };
  const isGateway = (key) => gateways.some(({ name }) => key.endsWith(name));
  console.log(
    table(
      ["", "added p50 ms, each round", "added p99 ms, each round", "others %", `p50 ≤ ${allowed.p50.toFixed(2)}, p99 ≤ ${allowed.p99.toFixed(2)}`],
      [...rows].map(([key, rounds]) => [
        key, each(rounds, "p50"), each(rounds, "p99"), each(rounds, "others", 0), isGateway(key) ? verdict(rounds) : "",
      ]),
    ),
  );
}

/** One run of the generator: { p50, p99 } in ms, and what others took of the machine. Every answer must be a 200. */
async function openLoop(subject, kind, upstream, postgres) {
  const args = [`${RATE}`, `${DURATION}`, `${subject[kind]}/v1/chat/completions`, WORKLOADS[kind].body, ...subject.keys];
  // A second of warming up: connections are opened, and none of it is counted.
  await output(join(BIN, "examples/openloop"), [args[0], "1", ...args.slice(2)], {}, 60);
  const ours = () => [...new Set([subject, upstream, postgres])].reduce((sum, one) => sum + cpuOf(one.child), 0);
  const before = { machine: machine(), ours: ours(), wall: performance.now() };
  const text = await output(join(BIN, "examples/openloop"), args, {}, DURATION + 60);
  const wallUs = (performance.now() - before.wall) * 1000;
  const [answered, errors, p50, , p99, , generatorUs] = text.trim().split(" ").map(Number);
  const taken = machine() - before.machine - (ours() - before.ours) - generatorUs;
  if (errors > 0 || answered === 0) throw new Error(`${subject.name}, ${kind}: ${errors} requests were not answered 200`);
  return { p50: p50 / 1000, p99: p99 / 1000, others: Math.max(0, (taken / (wallUs * CORES)) * 100) };
}

run(main, Number(process.env.BENCH_LIMIT ?? 1800));
