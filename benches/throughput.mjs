// How many requests a second, at which cost: the upstream alone, nginx, a plain pass-through, Farebox on SQLite and on
// PostgreSQL, LiteLLM where it is installed, in turn, in several rounds, each beginning with another.
//
//   node throughput.mjs target/release      BENCH_ROUNDS=3 BENCH_SECONDS=5 BENCH_FAREBOX=name=path,… BENCH_OUT=file.json
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  WORKLOADS, builds, check, litellmVersion, run, startFarebox, startLitellm, startPassthrough, startPostgres, startProxy,
  startUpstream,
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
  // BENCH_PEERS=none leaves one out that is installed.
  const litellm = process.env.BENCH_PEERS === "none" ? undefined : litellmVersion();
  const peers = litellm ? [await startLitellm(upstream)] : [];
  const subjects = [direct, proxy, passthrough, ...gateways, ...peers];

  for (const subject of subjects) await check(subject);
  const measurements = subjects.flatMap((subject) => [
    ...Object.keys(WORKLOADS).map((kind) => ({ subject, kind, keys: subject.keys, title: subject.name })),
    ...(subject.hotKeys ? [{ subject, kind: "json", keys: subject.hotKeys, title: `${subject.name}, one wallet` }] : []),
  ]);

  const fsync = fsyncTimes();
  console.log(describe([`PostgreSQL ${postgres.version}; fdatasync of 4 KB: p50 ${fsync.p50.toFixed(2)} ms, p99 ${fsync.p99.toFixed(2)} ms, others ${fsync.others.toFixed(0)} %`]));
  console.log(`${litellm ? `LiteLLM ${litellm}, two workers, no database` : "LiteLLM is left out: BENCH_PEERS=litellm installs it"}\n`);

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
    console.log(`${goals(name, peers, results)}\n`);
  }
}

/** Of each round the ratio to another subject's same round, and the median of these. */
const ratio = (results, kind, one, other) =>
  median(results.get(`${kind} ${one}`).map((seen, round) => seen.perSecond / results.get(`${kind} ${other}`)[round].perSecond));

/** A ratio with two digits at the least, however small or large. */
const times = (value) => (value >= 10 ? value.toFixed(0) : value >= 0.1 ? value.toFixed(2) : value.toPrecision(2));

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
      times(ratio(results, kind, title, "nginx")), times(ratio(results, kind, title, "pass-through")),
      of("p50", 2), of("p99", 2), cpu, Math.max(...rounds.map((seen) => seen.peak)).toFixed(0),
      Math.max(...rounds.map((seen) => seen.others)).toFixed(0),
    ];
  });
  return table(header, rows);
}

/** What was set out to reach, and what was. A figure that others had a hand in says so. */
function goals(name, peers, results) {
  const [sqlite, postgres] = [`${name} SQLite`, `${name} PostgreSQL`];
  const rounds = (kind, title) => results.get(`${kind} ${title}`);
  const said = (isMet, ...used) => {
    const disturbed = used.flat().some((seen) => seen.others > OTHERS_PERCENT);
    return `${isMet ? "met" : "not met"}${disturbed ? ", on a busy machine" : ""}`;
  };
  const atLeast = (what, kind, title, other, least) => {
    const is = ratio(results, kind, title, other);
    return [`${what}: ≥ ${least} × ${other}`, times(is), said(is >= least, rounds(kind, title), rounds(kind, other))];
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
      ...peers.flatMap(({ name: peer }) => [
        atLeast("SQLite, JSON", "json", sqlite, peer, 75),
        atLeast("SQLite, SSE", "sse", sqlite, peer, 75),
      ]),
    ],
  );
}

run(main, Number(process.env.BENCH_LIMIT ?? 3600));
