// What a request waits for at a quiet pace: 200 a second, each counted from the moment it was due, beside what the same
// request takes without anything in between, and beside what the disk takes to keep 4 KB.
//
//   node latency.mjs target/release      BENCH_ROUNDS=3 BENCH_SECONDS=10 BENCH_RATE=200 BENCH_FAREBOX=name=path,…
import { join } from "node:path";
import { WORKLOADS, builds, run, startFarebox, startPassthrough, startPostgres, startProxy, startUpstream } from "./house.mjs";
import { describe, fsyncTimes, median, output, table } from "./measure.mjs";

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
    disk.push(fsyncTimes());
    for (const kind of Object.keys(WORKLOADS)) {
      const direct = await openLoop(upstream, kind);
      for (const subject of [...subjects.slice(round % subjects.length), ...subjects.slice(0, round % subjects.length)]) {
        const seen = await openLoop(subject, kind);
        const added = { p50: seen.p50 - direct.p50, p99: seen.p99 - direct.p99, direct, seen };
        const key = `${kind === "json" ? "JSON" : "SSE"} ${subject.name}`;
        rows.set(key, [...(rows.get(key) ?? []), added]);
      }
    }
  }
  for (const gateway of gateways) gateway.audit();

  const fsync = { p50: median(disk.map((one) => one.p50)), p99: median(disk.map((one) => one.p99)) };
  console.log(`fdatasync of 4 KB in the same run: p50 ${fsync.p50.toFixed(2)} ms, p99 ${fsync.p99.toFixed(2)} ms`);
  const allowed = { p50: 0.5 + fsync.p50, p99: 2 + fsync.p99 };
  const each = (added, name) => added.map((one) => one[name].toFixed(2)).join(", ");
  const verdict = (added) => (["p50", "p99"].every((name) => median(added.map((one) => one[name])) <= allowed[name]) ? "met" : "not met");
  console.log(
    table(
      ["", "added p50 ms, each round", "added p99 ms, each round", `p50 ≤ ${allowed.p50.toFixed(2)}, p99 ≤ ${allowed.p99.toFixed(2)}`],
      [...rows].map(([key, added]) => [key, each(added, "p50"), each(added, "p99"), key.includes("SQLite") || key.includes("PostgreSQL") ? verdict(added) : ""]),
    ),
  );
}

/** One run of the generator: { p50, p99 } in ms. Every answer must be a 200. */
async function openLoop(subject, kind) {
  const args = [`${RATE}`, `${DURATION}`, `${subject[kind]}/v1/chat/completions`, WORKLOADS[kind].body, ...subject.keys];
  // A second of warming up: connections are opened, and none of it is counted.
  await output(join(BIN, "examples/openloop"), [args[0], "1", ...args.slice(2)], {}, 60);
  const text = await output(join(BIN, "examples/openloop"), args, {}, DURATION + 60);
  const [answered, errors, p50, , p99] = text.trim().split(" ").map(Number);
  if (errors > 0 || answered === 0) throw new Error(`${subject.name}, ${kind}: ${errors} requests were not answered 200`);
  return { p50: p50 / 1000, p99: p99 / 1000 };
}

run(main, Number(process.env.BENCH_LIMIT ?? 1800));
