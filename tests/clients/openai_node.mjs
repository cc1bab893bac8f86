// The official OpenAI SDK for Node against the gateway: only its base URL is changed.
//   FAREBOX_URL API_KEY MODEL [POOR_API_KEY]     POOR_API_KEY is a key of a wallet without a balance
// The upstream is model_server.mjs: the words in brackets are its triggers.
import OpenAI from "openai";
import { check, env, run, same, url } from "./lib.mjs";

const client = (apiKey) => new OpenAI({ apiKey, baseURL: url("/v1"), maxRetries: 0, timeout: 20_000 });
const openai = client(env("API_KEY"));
const model = env("MODEL");
const ask = (content, more = {}) => ({ model, messages: [{ role: "user", content }], max_tokens: 64, ...more });
const weather = {
  type: "function",
  function: { name: "get_weather", parameters: { type: "object", properties: { city: { type: "string" } } } },
};

async function plain() {
  const { data, response } = await openai.chat.completions.create(ask("Hello")).withResponse();
  const header = (name) => response.headers.get(name);
  check("plain: an answer", data.choices[0].message.content.length > 0, data);
  same("its model", data.model, model);
  check("x-request-id is there", header("x-request-id")?.length > 0);
  check("x-charged-usdc is a charge", /^[1-9]\d*$/.test(header("x-charged-usdc")), header("x-charged-usdc"));
  check("x-balance-usdc is a balance", /^\d+$/.test(header("x-balance-usdc")), header("x-balance-usdc"));
  same("usage.charged_usdc", data.usage.charged_usdc, Number(header("x-charged-usdc")));

  const next = await openai.chat.completions.create(ask("Hello again")).withResponse();
  const [before, after] = [response, next.response].map((r) => Number(r.headers.get("x-balance-usdc")));
  same("the balance fell by", before - after, next.data.usage.charged_usdc);
}

async function streams() {
  const read = async (more) => {
    const chunks = [];
    for await (const chunk of await openai.chat.completions.create(ask("Hello", { stream: true, ...more }))) {
      chunks.push(chunk);
    }
    return chunks;
  };
  const text = (chunks) => chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");

  const silent = await read({});
  check("stream: several chunks", silent.length > 3, silent.length);
  check("its text", text(silent).length > 0, silent);
  check("every chunk names the model", silent.every((chunk) => chunk.model === model), silent[0]);
  check("no usage unasked", silent.every((chunk) => !chunk.usage && chunk.choices.length > 0), silent.at(-1));

  const counted = await read({ stream_options: { include_usage: true } });
  same("the same text with usage asked", text(counted), text(silent));
  same("usage chunks", counted.filter((chunk) => chunk.usage).length, 1);
  check("the last chunk is the usage", counted.at(-1).usage?.total_tokens > 0, counted.at(-1));
  same("its choices", counted.at(-1).choices, []);
}

async function tools() {
  const first = ask("[tool] What is the weather?", { tools: [weather] });
  const { message, finish_reason } = (await openai.chat.completions.create(first)).choices[0];
  same("tools: the finish reason", finish_reason, "tool_calls");
  same("the tool's name", message.tool_calls[0].function.name, "get_weather");
  same("its arguments", JSON.parse(message.tool_calls[0].function.arguments), { city: "Lisbon" });

  const result = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "sunny" };
  const second = { ...first, messages: [...first.messages, message, result] };
  const answer = await openai.chat.completions.create(second);
  check("an answer to the tool's result", answer.choices[0].message.content.length > 0, answer);

  let streamed = "";
  for await (const chunk of await openai.chat.completions.create({ ...first, stream: true })) {
    streamed += chunk.choices[0]?.delta.tool_calls?.[0]?.function?.arguments ?? "";
  }
  same("the arguments of a streamed call", JSON.parse(streamed), { city: "Lisbon" });
}

async function models() {
  const rows = [];
  for await (const row of openai.models.list()) rows.push(row);
  const row = rows.find(({ id }) => id === model);
  check("models: ours is listed", row?.object === "model" && row.owned_by.length > 0, rows);
  check("with what it costs", Number(row.pricing.prompt) > 0 && Number(row.pricing.completion) > 0, row);
}

async function errors() {
  const refused = async (what, promise, type, status, code, param) => {
    const error = await promise.then(
      (answer) => check(`${what} is refused`, false, answer),
      (error) => error,
    );
    check(`${what}: ${type.name} ${status}`, error instanceof type && error.status === status, `${error}`);
    if (code) same("its code", error.code, code);
    if (param) same("its param", error.param, param);
    check("it has a request id", error.requestID?.length > 0);
    return error;
  };
  const create = (more, by = openai) => by.chat.completions.create(ask("Hello", more));
  const told = (trigger) => create({ messages: [{ role: "user", content: trigger }] });
  const { AuthenticationError, BadRequestError, InternalServerError, NotFoundError, RateLimitError } = OpenAI;

  await refused("a wrong key", create({}, client(`sk-${"0".repeat(64)}`)), AuthenticationError, 401);
  await refused("an unknown model", create({ model: "openai/gpt-0" }), NotFoundError, 404, "model_not_found");
  await refused("too many tokens", create({ max_tokens: 10_000_000 }), BadRequestError, 400, undefined, "max_tokens");
  await refused(
    "reasoning_effort",
    create({ reasoning_effort: "low" }),
    BadRequestError,
    400,
    "unsupported_parameter",
    "reasoning_effort",
  );
  if (process.env.POOR_API_KEY) {
    const poor = await refused(
      "an empty wallet",
      create({}, client(env("POOR_API_KEY"))),
      OpenAI.APIError,
      402,
      "insufficient_balance",
    );
    same("its type", poor.type, "billing_error");
    check("it brings the terms of a top-up", poor.headers.get("payment-required")?.length > 0);
  }
  const limited = await refused("an upstream 429", told("[rate-limited]"), RateLimitError, 429);
  same("its retry-after", limited.headers.get("retry-after"), "7");
  await refused("an upstream 400", told("[bad-request]"), BadRequestError, 400);
  await refused("an upstream 500", told("[broken]"), InternalServerError, 502);
  const denied = await refused("a wrong upstream key", told("[denied]"), InternalServerError, 502);
  check("which is not shown", !`${denied.message}`.includes("sk-upstream-secret"), denied.message);
  await refused("nonsense from upstream", told("[nonsense]"), InternalServerError, 502);
  await refused("an upstream that hangs up", told("[hang-up]"), InternalServerError, 502);

  const seen = [];
  const cut = (async () => {
    for await (const chunk of await openai.chat.completions.create(ask("[cut]", { stream: true }))) seen.push(chunk);
  })();
  const broken = await cut.then(
    () => check("a stream cut upstream ends in an error", false, seen.length),
    (error) => error,
  );
  check("a stream cut upstream: an APIError after some chunks", broken instanceof OpenAI.APIError && seen.length > 0, `${broken}`);
}

run(async () => {
  await plain();
  await streams();
  await tools();
  await models();
  await errors();
});
