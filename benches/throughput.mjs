// How many requests a second, at which cost: the upstream alone, nginx, a plain pass-through, Farebox on SQLite and on
// PostgreSQL, in turn, in several rounds, each beginning with another.
//
//   node throughput.mjs target/release      BENCH_ROUNDS=3 BENCH_SECONDS=5 BENCH_FAREBOX=name=path,… BENCH_OUT=file.json
import { spawnSync } from "node:child_process";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  WORKLOADS, ask, builds, run, startFarebox, startPassthrough, startPostgres, startProxy, startUpstream,
} from "./house.mjs";
import { OTHERS_PERCENT, beginRound, describe, fsyncTimes, measure, median, table } from "./measure.mjs";

const ROUNDS = Number(process.env.BENCH_ROUNDS ?? 3);
const DURATION = Number(process.env.BENCH_SECONDS ?? 5);
const BIN = process.argv[2];

async function main() {
  const upstream = await startUpstream();
  const proxy = await startProxy(upstream);
  const passthrough = await startPassthrough(join(BIN, "examples/passthrough"), upstream);
  const postgres = await startPostgres();
  const gateways = [];
  for (const { name, path } of builds(join(BIN, "farebox"))) {
    gateways.push(await startFarebox(`${name} SQLite`, path, undefined, upstream));
    gateways.push({ ...(await startFarebox(`${name} PostgreSQL`, path, postgres.database(`bench_${gateways.length}`), upstream)), postgres });
  }
  const direct = Object.assign(upstream, { name: "upstream alone" });
  const subjects = [direct, proxy, passthrough, ...gateways];
  const litellm = spawnSync("litellm", ["--version"]).status === 0;

  for (const subject of subjects) await check(subject);
  const measurements = subjects.flatMap((subject) => [
    ...Object.keys(WORKLOADS).map((kind) => ({ subject, kind, keys: subject.keys, title: subject.name })),
    ...(subject.hotKeys ? [{ subject, kind: "json", keys: subject.hotKeys, title: `${subject.name}, one wallet` }] : []),
  ]);

  const fsync = fsyncTimes();
  console.log(describe([`PostgreSQL ${postgres.version}; fdatasync of 4 KB: p50 ${fsync.p50.toFixed(2)} ms, p99 ${fsync.p99.toFixed(2)} ms, others ${fsync.others.toFixed(0)} %`]));
  console.log(`${litellm ? "LiteLLM is installed, and no subject of this program yet" : "LiteLLM is not installed: left out"}\n`);

  const results = new Map();
  for (let round = 0; round < ROUNDS; round++) {
    beginRound();
    // Every round begins elsewhere, so that nobody always comes after the same one.
    const first = Math.floor((measurements.length * round) / ROUNDS);
    for (const one of [...measurements.slice(first), ...measurements.slice(0, first)]) {
      const seen = await measure({ ...one, upstream, postgres: one.subject.postgres, duration: DURATION });
      const key = `${one.kind} ${one.title}`;
      results.set(key, [...(results.get(key) ?? []), seen]);
      const { perSecond, p50, p99, cpu, postgresCpu, peak, others } = seen;
      console.log(
        `round ${round + 1}  ${key.padEnd(34)} ${perSecond.toFixed(0).padStart(7)}/s  p50 ${p50.toFixed(2)} ms  p99 ${p99.toFixed(2)} ms  ` +
          `${cpu.toFixed(0)} µs${postgresCpu ? ` + ${postgresCpu.toFixed(0)} µs` : ""}  ${peak.toFixed(0)} MB  others ${others.toFixed(1)} %`,
      );
    }
    for (const gateway of gateways) gateway.audit();
    console.log(`round ${round + 1}  the audit finds the books of every gateway in order\n`);
  }

  if (process.env.BENCH_OUT) writeFileSync(process.env.BENCH_OUT, JSON.stringify(Object.fromEntries(results), null, 1));
  for (const kind of Object.keys(WORKLOADS)) console.log(`${summary(kind, measurements, results)}\n`);
  for (const gateway of gateways.filter((one) => !one.postgres)) {
    const name = gateway.name.replace(/ SQLite$/, "");
    console.log(`${goals(name, results)}\n`);
  }
}

/** Before anything is counted: the subject answers as the upstream does. */
async function check(subject) {
  for (const [kind, { ends }] of Object.entries(WORKLOADS)) {
    const answer = await ask(subject, kind);
    const text = await answer.text();
    if (answer.status !== 200 || !ends(text)) throw new Error(`${subject.name}, ${kind}: ${answer.status} ${text}`);
  }
}

/** Of each round the ratio to another subject's same round, and the median of these. */
const ratio = (results, kind, one, other) =>
  median(results.get(`${kind} ${one}`).map((seen, round) => seen.perSecond / results.get(`${kind} ${other}`)[round].perSecond));

function summary(kind, measurements, results) {
  const header = [
    `${kind === "json" ? "JSON" : "SSE"}`, "requests/s, each round", "× nginx", "× pass-through", "p50 ms", "p99 ms", "CPU µs/request", "peak RSS MB",
    "others %",
  ];
  const rows = measurements.filter((one) => one.kind === kind).map(({ title }) => {
    const rounds = results.get(`${kind} ${title}`);
    const of = (name, digits) => median(rounds.map((seen) => seen[name])).toFixed(digits);
    const cpu = rounds.some((seen) => seen.postgresCpu > 0) ? `${of("cpu", 0)} + ${of("postgresCpu", 0)}` : of("cpu", 0);
    return [
      title, rounds.map((seen) => seen.perSecond.toFixed(0)).join(", "),
      ratio(results, kind, title, "nginx").toFixed(2), ratio(results, kind, title, "pass-through").toFixed(2),
      of("p50", 2), of("p99", 2), cpu, Math.max(...rounds.map((seen) => seen.peak)).toFixed(0),
      Math.max(...rounds.map((seen) => seen.others)).toFixed(0),
    ];
  });
  return table(header, rows);
}

/** What was set out to reach, and what was. A figure that others had a hand in says so. */
function goals(name, results) {
  const [sqlite, postgres] = [`${name} SQLite`, `${name} PostgreSQL`];
  const rounds = (kind, title) => results.get(`${kind} ${title}`);
  const said = (isMet, ...used) => {
    const disturbed = used.flat().some((seen) => seen.others > OTHERS_PERCENT);
    return `${isMet ? "met" : "not met"}${disturbed ? ", on a busy machine" : ""}`;
  };
  const atLeast = (what, kind, title, other, least) => {
    const is = ratio(results, kind, title, other);
    return [`${what}: ≥ ${least} × ${other}`, is.toFixed(2), said(is >= least, rounds(kind, title), rounds(kind, other))];
  };
  const cpuAtMost = (what, kind, most) => {
    const is = median(rounds(kind, sqlite).map((seen) => seen.cpu));
    return [`${what}: ≤ ${most} µs of CPU a request`, is.toFixed(0), said(is <= most, rounds(kind, sqlite))];
  };
  const peak = Math.max(...[...rounds("json", sqlite), ...rounds("sse", sqlite)].map((seen) => seen.peak));
  return table(
    [`${name}: goal`, "measured", ""],
    [
      atLeast("SQLite, JSON", "json", sqlite, "pass-through", 1),
      atLeast("SQLite, SSE", "sse", sqlite, "pass-through", 1),
      atLeast("SQLite, JSON (stretch)", "json", sqlite, "nginx", 0.6),
      atLeast("SQLite, SSE (stretch)", "sse", sqlite, "nginx", 0.6),
      cpuAtMost("SQLite, JSON", "json", 150),
      cpuAtMost("SQLite, SSE", "sse", 150),
      ["SQLite: ≤ 60 MB of memory at the peak", peak.toFixed(0), said(peak <= 60)],
      atLeast("PostgreSQL, JSON", "json", postgres, "nginx", 0.25),
    ],
  );
}

run(main, Number(process.env.BENCH_LIMIT ?? 3600));
