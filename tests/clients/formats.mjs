// What the gateway makes of one format's answers and requests in another's (tests/formats/expected), read by those
// formats' own clients and taken by a model server (@copilotkit/aimock), none of which was written here. No gateway
// is needed: a server on this machine says what the gateway would.
import { readFileSync, readdirSync } from "node:fs";
import { createServer } from "node:http";
import { isDeepStrictEqual } from "node:util";
import Anthropic from "@anthropic-ai/sdk";
import { LLMock } from "@copilotkit/aimock";
import OpenAI from "openai";
import { check, run } from "./lib.mjs";

const folder = new URL("../formats/expected/", import.meta.url);
const files = (name) =>
  readdirSync(folder)
    .map((file) => ({ file, match: file.match(name) }))
    .filter(({ match }) => match)
    .map(({ file, match }) => ({ file, match, cases: JSON.parse(readFileSync(new URL(file, folder))) }));

const isEvent = (data) => typeof data === "object" && data.type !== undefined;
const sse = (events) =>
  events
    .map((data) => (isEvent(data) ? `event: ${data.type}\n` : "") + `data: ${data === "[DONE]" ? data : JSON.stringify(data)}\n\n`)
    .join("");

/** A server that answers every request with `answer`, whole or as a stream. */
async function serving(work) {
  const state = {};
  const server = createServer((request, response) => {
    request.resume().on("end", () => {
      const stream = state.wantsStream;
      response.setHeader("content-type", stream ? "text/event-stream" : "application/json");
      response.end(stream ? sse(state.answer.stream) : JSON.stringify(state.answer.whole));
    });
  });
  await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
  try {
    await work(state, `http://127.0.0.1:${server.address().port}`);
  } finally {
    server.close();
  }
}

const settings = (baseURL) => ({ apiKey: "none", baseURL, maxRetries: 0, timeout: 10_000 });
const question = [{ role: "user", content: "?" }];

/** The parts of a message that both ways of having it must agree on. */
const chatParts = ({ choices: [{ message, finish_reason }], usage }) => ({
  content: message.content || null,
  refusal: message.refusal || null,
  calls: (message.tool_calls ?? []).map(({ id, function: { name, arguments: text } }) => ({ id, name, text })),
  finish_reason,
  usage,
});

const readers = {
  async chat(state, base) {
    const openai = new OpenAI(settings(`${base}/v1`));
    const ask = { model: "p/m", messages: question };
    state.wantsStream = false;
    const whole = await openai.chat.completions.create(ask);
    state.wantsStream = true;
    const streamed = await openai.chat.completions
      .stream({ ...ask, stream_options: { include_usage: true } })
      .finalChatCompletion();
    return [chatParts(whole), chatParts(streamed), chatParts(state.answer.whole)];
  },
  async responses(state, base) {
    const openai = new OpenAI(settings(`${base}/v1`));
    const ask = { model: "p/m", input: "?" };
    const parts = ({ output, status, usage, incomplete_details }) => ({
      output: output.map(({ parsed_arguments, ...item }) => ({
        ...item,
        ...(item.content && { content: item.content.map(({ parsed, ...part }) => part) }),
      })),
      status,
      usage,
      incomplete_details,
    });
    state.wantsStream = false;
    const whole = await openai.responses.create(ask);
    state.wantsStream = true;
    const streamed = await openai.responses.stream(ask).finalResponse();
    return [parts(whole), parts(streamed), parts(state.answer.whole)];
  },
  async messages(state, base) {
    const anthropic = new Anthropic(settings(base));
    const ask = { model: "p/m", max_tokens: 9, messages: question };
    const parts = ({ content, stop_reason, stop_sequence, usage }) => ({
      content: content.map(({ parsed_output, ...block }) => block),
      stop_reason,
      stop_sequence,
      usage: Object.fromEntries(
        ["input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens"].map((key) => [
          key,
          usage[key],
        ]),
      ),
    });
    state.wantsStream = false;
    const whole = await anthropic.messages.create(ask);
    state.wantsStream = true;
    const streamed = await anthropic.messages.stream(ask).finalMessage();
    return [parts(whole), parts(streamed), parts(state.answer.whole)];
  },
};

/** Without the members that are there and undefined, and without what one class adds to another's. */
const bare = (value) => JSON.parse(JSON.stringify(value));

async function answers() {
  for (const { file, match, cases } of files(/^answers_(\w+)_to_(\w+)\.json$/)) {
    await serving(async (state, base) => {
      for (const [name, answer] of Object.entries(cases)) {
        state.answer = answer;
        const [whole, streamed, expected] = (await readers[match[2]](state, base)).map(bare);
        check(`${file} ${name}, whole`, isDeepStrictEqual(whole, expected), { whole, expected });
        check(`${file} ${name}, streamed`, isDeepStrictEqual(streamed, expected), { streamed, expected });
      }
    });
  }
}

const headers = {
  "content-type": "application/json",
  authorization: "Bearer none",
  "x-api-key": "none",
  "x-goog-api-key": "none",
  "anthropic-version": "2023-06-01",
};
const prefixes = { chat: "/v1/", messages: "/v1/", gemini: "/v1beta/" };

async function requests() {
  const server = new LLMock({ port: 0, host: "127.0.0.1" });
  server.on({}, { content: "Taken." });
  const base = await server.start();
  try {
    for (const { file, match, cases } of files(/^requests_(\w+)_to_(\w+)\.json$/)) {
      for (const [name, { path, body }] of Object.entries(cases)) {
        if (!path) continue;
        const url = base + prefixes[match[2]] + path;
        const response = await fetch(url, { method: "POST", headers, body: JSON.stringify(body) });
        const text = await response.text();
        check(`${file} ${name} is taken`, response.status === 200 && text.includes("Taken."), text);
      }
    }
  } finally {
    await server.stop();
  }
}

run(async () => {
  await answers();
  await requests();
});
