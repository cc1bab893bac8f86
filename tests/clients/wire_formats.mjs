// The official OpenAI and Anthropic SDKs for Node against the gateway, each in its own format, over upstreams of every
// kind: only the base URL is changed. Prints a table of what was run.
//   FAREBOX_URL API_KEY POOR_API_KEY MODELS     MODELS: {"what the upstream speaks": "the model's id", …}
// The upstream is model_server.mjs: the words in brackets are its triggers.
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";
import { call, check, env, run, same, url } from "./lib.mjs";

const PLAIN = "A wallet is all you need: sign in, pay for what you use, and keep the rest.";
// 20 prompt tokens at $0.15 a million and 9 of completion at $0.60, and a fifth on top: 10.08, rounded up.
const PLAIN_CHARGE = 11;
// 40 and 15: 18.
const TOOL_CHARGE = 18;
const PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";
const SCHEMA = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };

const models = JSON.parse(env("MODELS"));
const settings = (apiKey) => ({ apiKey, maxRetries: 0, timeout: 20_000 });
const openai = (key = env("API_KEY")) => new OpenAI({ ...settings(key), baseURL: url("/v1") });
const anthropic = (key = env("API_KEY")) => new Anthropic({ ...settings(key), baseURL: url("") });

/** Each client, as functions of a model and of what is said; each answers { id, text, calls, charged }. */
const clients = {
  chat: {
    sdk: openai,
    ask: (model, content, more = {}) => ({ model, messages: [{ role: "user", content }], max_tokens: 64, ...more }),
    image: [
      { type: "text", text: "What is this?" },
      { type: "image_url", image_url: { url: `data:image/png;base64,${PIXEL}` } },
    ],
    tools: { tools: [{ type: "function", function: { name: "get_weather", parameters: SCHEMA } }] },
    result: (ask, answer, result) => ({
      ...ask,
      messages: [...ask.messages, answer.message, { role: "tool", tool_call_id: answer.calls[0].id, content: result }],
    }),
    plain: async (sdk, ask) => chatAnswer(await sdk.chat.completions.create(ask).withResponse()),
    stream: async (sdk, ask) => {
      const stream = sdk.chat.completions.stream({ ...ask, stream_options: { include_usage: true } });
      return chatAnswer({ data: await stream.finalChatCompletion(), pieces: await pieces(stream) });
    },
  },
  responses: {
    sdk: openai,
    ask: (model, content, more = {}) => ({ model, input: [{ role: "user", content }], max_output_tokens: 64, ...more }),
    image: [
      { type: "input_text", text: "What is this?" },
      { type: "input_image", image_url: `data:image/png;base64,${PIXEL}`, detail: "auto" },
    ],
    tools: { tools: [{ type: "function", name: "get_weather", parameters: SCHEMA, strict: false }] },
    result: (ask, answer, result) => ({
      ...ask,
      input: [...ask.input, ...answer.output, { type: "function_call_output", call_id: answer.calls[0].id, output: result }],
    }),
    plain: async (sdk, ask) => responsesAnswer(await sdk.responses.create(ask).withResponse()),
    stream: async (sdk, ask) => {
      const stream = sdk.responses.stream(ask);
      return responsesAnswer({ data: await stream.finalResponse() });
    },
  },
  messages: {
    sdk: anthropic,
    ask: (model, content, more = {}) => ({ model, messages: [{ role: "user", content }], max_tokens: 64, ...more }),
    image: [
      { type: "text", text: "What is this?" },
      { type: "image", source: { type: "base64", media_type: "image/png", data: PIXEL } },
    ],
    tools: { tools: [{ name: "get_weather", input_schema: SCHEMA }] },
    result: (ask, answer, content) => ({
      ...ask,
      messages: [
        ...ask.messages,
        { role: "assistant", content: answer.content },
        { role: "user", content: [{ type: "tool_result", tool_use_id: answer.calls[0].id, content }] },
      ],
    }),
    plain: async (sdk, ask) => messagesAnswer(await sdk.messages.create(ask).withResponse()),
    stream: async (sdk, ask) => messagesAnswer({ data: await sdk.messages.stream(ask).finalMessage() }),
  },
};

const pieces = async (stream) => stream.receivedEvents ?? [];
const idOf = (response) => response?.headers.get("x-request-id");

const chatAnswer = ({ data, response }) => ({
  id: idOf(response),
  model: data.model,
  message: data.choices[0].message,
  text: data.choices[0].message.content,
  calls: (data.choices[0].message.tool_calls ?? []).map(({ id, function: f }) => ({ id, name: f.name, input: JSON.parse(f.arguments) })),
  stop: data.choices[0].finish_reason === "tool_calls" ? "calls" : data.choices[0].finish_reason,
  charged: data.usage.charged_usdc,
});

const responsesAnswer = ({ data, response }) => ({
  id: idOf(response),
  model: data.model,
  output: data.output,
  text: data.output_text,
  calls: data.output
    .filter((item) => item.type === "function_call")
    .map((item) => ({ id: item.call_id, name: item.name, input: JSON.parse(item.arguments) })),
  stop: data.output.some((item) => item.type === "function_call") ? "calls" : { completed: "stop" }[data.status],
  charged: data.usage.charged_usdc,
});

const messagesAnswer = ({ data, response }) => ({
  id: idOf(response),
  model: data.model,
  content: data.content,
  text: data.content.filter((block) => block.type === "text").map((block) => block.text).join(""),
  calls: data.content.filter((block) => block.type === "tool_use").map(({ id, name, input }) => ({ id, name, input })),
  stop: { tool_use: "calls", end_turn: "stop" }[data.stop_reason],
  charged: data.usage.charged_usdc,
});

const receipt = async (id) => (await call("GET", `/v1/requests/${id}`, { key: env("API_KEY") })).body;
const balance = async () => (await call("GET", "/v1/requests?limit=1", { key: env("API_KEY") })).body.data[0];

/** What holds of every answer, streamed or not. */
async function whole(what, answer, model, upstream, charge) {
  same(`${what}: its model`, answer.model, model);
  // A stream's answer has no head that the SDK shows; the receipt is then the latest.
  const booked = answer.id ? await receipt(answer.id) : await balance();
  same(`${what}: the receipt's outcome, provider and charge`, [booked.outcome, booked.provider, booked.charged_usdc], ["settled", upstream, charge]);
  if (answer.charged !== undefined) same(`${what}: usage.charged_usdc`, answer.charged, charge);
  return booked;
}

async function conversations(format, client, upstream, model) {
  const sdk = client.sdk();
  const what = (part) => `${format} over ${upstream}, ${part}`;
  for (const mode of ["plain", "stream"]) {
    const answer = await client[mode](sdk, client.ask(model, "Hello"));
    same(what(mode), [answer.text, answer.stop], [PLAIN, "stop"]);
    await whole(what(mode), answer, model, upstream, PLAIN_CHARGE);

    const ask = client.ask(model, "[tool] What is the weather?", client.tools);
    const called = await client[mode](sdk, ask);
    same(what(`${mode} with a tool`), called.calls.map(({ name, input }) => ({ name, input })), [{ name: "get_weather", input: { city: "Lisbon" } }]);
    same(what(`${mode}: why it stopped`), called.stop, "calls");
    await whole(what(`${mode} with a tool`), called, model, upstream, TOOL_CHARGE);

    const after = await client[mode](sdk, client.result(ask, called, "Sunny, 24 °C"));
    same(what(`${mode} with a tool's result`), after.text, PLAIN);

    const seen = await client[mode](sdk, client.ask(model, client.image));
    same(what(`${mode} with a picture`), seen.text, PLAIN);
  }
}

async function errors(format, client, upstream, model) {
  const what = (part) => `${format} over ${upstream}, ${part}`;
  const refused = async (part, status, work, kind) => {
    try {
      await work();
    } catch (error) {
      same(what(part), error.status, status);
      if (kind) same(what(`${part}: the error's type`), error.error?.error?.type ?? error.type, kind);
      return error;
    }
    return check(what(`${part} is refused`), false);
  };
  const bySdk = (sdk, content, more) => () => client.plain(sdk, client.ask(model, content, more));
  const sdk = client.sdk();
  const limited = await refused("an upstream's 429", 429, bySdk(sdk, "[rate-limited]"), "rate_limit_error");
  same(what("its Retry-After"), limited.headers.get("retry-after"), "7");
  await refused("an upstream's 400", 400, bySdk(sdk, "[bad-request]"), "invalid_request_error");
  await refused("an upstream's 500", 502, bySdk(sdk, "[broken]"), format === "messages" ? "api_error" : "server_error");
  await refused("an upstream's 401", 502, bySdk(sdk, "[denied]"));
  await refused("a wrong key", 401, bySdk(client.sdk("sk-" + "0".repeat(64)), "Hello"), "authentication_error");
  await refused("an empty wallet", 402, bySdk(client.sdk(env("POOR_API_KEY")), "Hello"), "billing_error");
  const unknown = await refused("an unknown model", 404, () => client.plain(sdk, client.ask("openai/gpt-0", "Hello")));
  check(what("its request id"), unknown.requestID?.startsWith("req_"), unknown.requestID);
  // Cut in the middle: some of it comes, and then an error.
  await client.stream(sdk, client.ask(model, "[cut]")).then(
    (answer) => check(what("a stream cut in the middle ends in an error"), false, answer),
    (error) => check(what("a stream cut in the middle ends in an error"), error instanceof (format === "messages" ? Anthropic.AnthropicError : OpenAI.OpenAIError), `${error}`),
  );
}

async function counting() {
  for (const [upstream, model] of Object.entries(models)) {
    const { input_tokens } = await anthropic().messages.countTokens({ model, messages: [{ role: "user", content: "twelve bytes" }] });
    check(`tokens are counted over ${upstream}`, Number.isInteger(input_tokens) && input_tokens > 0, input_tokens);
  }
}

run(async () => {
  const rows = [];
  for (const [upstream, model] of Object.entries(models)) {
    for (const [format, client] of Object.entries(clients)) {
      await conversations(format, client, upstream, model);
      await errors(format, client, upstream, model);
      rows.push(`| ${upstream} | ${format} | yes | yes | yes | yes | yes |`);
    }
  }
  await counting();
  console.log(`\n| provider | client | plain | stream | tools | pictures | errors |\n| --- | --- | --- | --- | --- | --- | --- |\n${rows.join("\n")}`);
});
