// What an open stream costs: many at once that say a word every few seconds, all of them held open, then all ended by
// the upstream, whole and paid for.
//
//   node streams.mjs target/release      BENCH_STREAMS=2000 BENCH_FAREBOX=name=path,…
import { once } from "node:events";
import { Agent, createServer, request } from "node:http";
import { join } from "node:path";
import { WORKLOADS, builds, run, seconds, startFarebox, startPassthrough, startPostgres } from "./house.mjs";
import { describe, memory, table } from "./measure.mjs";

const STREAMS = Number(process.env.BENCH_STREAMS ?? 2000);
const AT_ONCE = 100;
const WORD_EVERY_S = 5;
const BIN = process.argv[2];

async function main() {
  const upstream = await slowUpstream();
  const passthrough = await startPassthrough(join(BIN, "examples/passthrough"), upstream);
  const postgres = await startPostgres();
  const subjects = [passthrough];
  for (const { name, path } of builds(join(BIN, "farebox"))) {
    subjects.push(await startFarebox(`${name} SQLite`, path, undefined, upstream));
    subjects.push(await startFarebox(`${name} PostgreSQL`, path, postgres.database(`bench_${subjects.length}`), upstream));
  }
  console.log(`${describe([`${STREAMS} streams open at once`])}\n`);
  const rows = [];
  for (const subject of subjects) {
    const before = memory(subject.child).now;
    const begin = performance.now();
    const streams = await openAll(subject);
    const opened = (performance.now() - begin) / 1000;
    // Long enough for every stream to have said something more.
    await seconds(WORD_EVERY_S + 2);
    const open = memory(subject.child).now;
    upstream.end();
    const whole = (await Promise.all(streams)).filter(Boolean).length;
    if (whole !== STREAMS) throw new Error(`${subject.name}: ${STREAMS - whole} of ${STREAMS} streams did not end whole`);
    await seconds(1);
    subject.audit?.();
    const each = ((open - before) * 1024) / STREAMS;
    rows.push([subject.name, before.toFixed(0), open.toFixed(0), each.toFixed(1), memory(subject.child).now.toFixed(0), opened.toFixed(1)]);
  }
  console.log(table(["", "RSS before, MB", "with all open, MB", "a stream, KB", "after, MB", "opened in s"], rows));
}

/** An upstream whose streams say their first word at once, then one every few seconds, until they are told to end. */
async function slowUpstream() {
  const open = new Set();
  const [first, ...rest] = WORKLOADS.sse.answer.split(/(?<=\n\n)/);
  const server = createServer((request, response) => {
    request.resume();
    response.writeHead(200, { "content-type": "text/event-stream" });
    response.write(first);
    open.add(response);
    response.on("close", () => open.delete(response));
  });
  server.listen({ port: 0, host: "127.0.0.1", backlog: 4096 });
  await once(server, "listening");
  setInterval(() => open.forEach((response) => response.write(first)), WORD_EVERY_S * 1000).unref();
  const url = `http://127.0.0.1:${server.address().port}`;
  return { workloads: WORKLOADS, json: url, sse: url, end: () => open.forEach((response) => response.end(rest.join(""))) };
}

/** Opens all streams, a few at a time; returns a promise for each, of whether it came to its end whole. */
async function openAll(subject) {
  const agent = new Agent({ keepAlive: false, maxSockets: Infinity });
  const streams = [];
  let next = 0;
  const worker = async () => {
    while (next < STREAMS) {
      const { began, ended } = openOne(subject, agent, subject.keys[next++ % subject.keys.length]);
      await began;
      streams.push(ended);
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, worker));
  return streams;
}

function openOne(subject, agent, key) {
  const { body } = WORKLOADS.sse;
  const headers = { "content-type": "application/json", "content-length": body.length, authorization: `Bearer ${key}` };
  const call = request(`${subject.sse}/v1/chat/completions`, { method: "POST", agent, headers });
  let [begin, fail, end] = [];
  const began = new Promise((resolve, reject) => ([begin, fail] = [resolve, reject]));
  const ended = new Promise((resolve) => (end = resolve));
  let last = "";
  call.on("error", (error) => (fail(error), end(false)));
  call.on("response", (response) => {
    if (response.statusCode !== 200) fail(new Error(`${subject.name}: status ${response.statusCode}`));
    response.on("data", (piece) => {
      begin();
      last = (last + piece).slice(-20);
    });
    response.on("error", () => end(false));
    response.on("end", () => end(last.trimEnd().endsWith("data: [DONE]")));
  });
  call.end(body);
  return { began, ended };
}

run(main, Number(process.env.BENCH_LIMIT ?? 900));
