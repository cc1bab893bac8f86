// What large bodies cost: a prompt of 200 KB, an answer of 2 MB, streams of 2 MB in many events and in few; beside the
// small ones of the same run, through the upstream alone, nginx, a plain pass-through and Farebox on SQLite.
//
//   node bodies.mjs target/release      BENCH_ROUNDS=3 BENCH_SECONDS=3 BENCH_FAREBOX=name=path,…
import { join } from "node:path";
import {
  WORKLOADS, builds, check, run, startFarebox, startPassthrough, startProxy, startUpstream, streamed, whole,
} from "./house.mjs";
import { beginRound, describe, measure, median, table } from "./measure.mjs";

const ROUNDS = Number(process.env.BENCH_ROUNDS ?? 3);
const DURATION = Number(process.env.BENCH_SECONDS ?? 3);
const BIN = process.argv[2];
const [PROMPT_BYTES, ANSWER_BYTES] = [200_000, 2_000_000];

/** Text as models write it: words, now and then a line break and a quotation mark, which JSON escapes. */
function text(bytes) {
  const line = 'The quick brown fox said "jumps over the lazy dog", and so it did.\n';
  return line.repeat(Math.ceil(bytes / line.length)).slice(0, bytes);
}

/** A stream of so many bytes whose events say `words` bytes each. */
function streamOf(kind, words) {
  const each = streamed(kind, [text(words), text(words)]).answer.length - streamed(kind, [text(words)]).answer.length;
  return streamed(kind, Array.from({ length: Math.round(ANSWER_BYTES / each) }, () => text(words)));
}

/** Each with the small one whose way it goes. */
const LARGE = {
  prompt: { ...whole("prompt", ["A", " few", " words."], text(PROMPT_BYTES)), like: "json", title: "prompt of 200 KB" },
  answer: { ...whole("answer", [text(ANSWER_BYTES)]), like: "json", title: "JSON answer of 2 MB" },
  few: { ...streamOf("few", 8000), like: "sse", title: "stream of 2 MB" },
  many: { ...streamOf("many", 5), like: "sse", title: "stream of 2 MB" },
};
const TITLES = { json: "small JSON", sse: "small stream" };

const megabytes = ({ body, answer }) => (body.length + answer.length) / 1e6;
const events = ({ answer }) => answer.split("\n\n").length - 1;

async function main() {
  const workloads = { ...WORKLOADS, ...LARGE };
  for (const kind of ["few", "many"]) LARGE[kind].title += `, ${events(LARGE[kind])} events`;
  for (const [kind, { title }] of Object.entries(LARGE)) TITLES[kind] = title;
  const upstream = await startUpstream(workloads);
  const proxy = await startProxy(upstream);
  const passthrough = await startPassthrough(join(BIN, "examples/passthrough"), upstream);
  const gateways = [];
  for (const { name, path } of builds(join(BIN, "farebox"))) {
    gateways.push(await startFarebox(`${name} SQLite`, path, undefined, upstream));
  }
  const subjects = [Object.assign(upstream, { name: "upstream alone" }), proxy, passthrough, ...gateways];
  for (const subject of subjects) await check(subject);
  console.log(`${describe([])}\n`);

  const measurements = Object.keys(workloads).flatMap((kind) => subjects.map((subject) => ({ subject, kind })));
  const results = new Map();
  for (let round = 0; round < ROUNDS; round++) {
    beginRound();
    const first = Math.floor((measurements.length * round) / ROUNDS);
    for (const { subject, kind } of [...measurements.slice(first), ...measurements.slice(0, first)]) {
      const seen = await measure({ subject, kind, keys: subject.keys, upstream, duration: DURATION });
      const key = `${kind} ${subject.name}`;
      results.set(key, [...(results.get(key) ?? []), seen]);
      const { perSecond, cpu, peak, others } = seen;
      console.log(
        `round ${round + 1}  ${TITLES[kind].padEnd(32)} ${subject.name.padEnd(16)} ${perSecond.toFixed(0).padStart(7)}/s  ` +
          `${cpu.toFixed(0)} µs  ${peak.toFixed(0)} MB  others ${others.toFixed(1)} %`,
      );
    }
    for (const gateway of gateways) gateway.audit();
    console.log(`round ${round + 1}  the audit finds the books of every gateway in order\n`);
  }
  console.log(`${summary(workloads, subjects, results)}\n`);
  for (const gateway of gateways) console.log(`${added(gateway, results)}\n`);
}

function summary(workloads, subjects, results) {
  const rows = Object.entries(workloads).flatMap(([kind, workload]) =>
    subjects.map(({ name }) => {
      const rounds = results.get(`${kind} ${name}`);
      const cpu = median(rounds.map((seen) => seen.cpu));
      return [
        `${TITLES[kind]}: ${name}`, rounds.map((seen) => seen.perSecond.toFixed(0)).join(", "), cpu.toFixed(0),
        LARGE[kind] ? (cpu / megabytes(workload)).toFixed(0) : "",
        Math.max(...rounds.map((seen) => seen.peak)).toFixed(0), Math.max(...rounds.map((seen) => seen.others)).toFixed(0),
      ];
    }),
  );
  return table(["", "requests/s, each round", "CPU µs/request", "CPU µs/MB", "peak RSS MB", "others %"], rows);
}

/** What a gateway takes above the pass-through of the same round, and how much of that comes with the size. */
function added({ name }, results) {
  const above = (kind) =>
    results.get(`${kind} ${name}`).map((seen, round) => seen.cpu - results.get(`${kind} pass-through`)[round].cpu);
  const rows = Object.entries(LARGE).map(([kind, workload]) => {
    const [large, small] = [above(kind), above(workload.like)];
    const grown = large.map((one, round) => one - small[round]);
    const each = (values, per = 1) => values.map((one) => (one / per).toFixed(0)).join(", ");
    return [workload.title, each(small), each(large), each(grown, megabytes(workload))];
  });
  return table([`${name}: CPU above the pass-through, µs, each round`, "small", "large", "for each MB more"], rows);
}

run(main, Number(process.env.BENCH_LIMIT ?? 1800));
