// A model server nobody here wrote (@copilotkit/aimock) with fixed answers, on PORT or a port the system chose.
// Prints `ready http://127.0.0.1:PORT` when it listens; the OpenAI base URL is that and `/v1`.
//
// What it answers is chosen by a word in the last user message:
//
//   [tool]          one call of get_weather({"city":"Lisbon"}); 40 prompt and 15 completion tokens
//   [long]          120 chunks when streamed; 20 prompt and 600 completion tokens
//   [slow]          the plain answer, a chunk every 100 ms when streamed (about two seconds)
//   [cut]           when streamed, the connection is destroyed after three or four chunks; else plain
//   [rate-limited]  429 with Retry-After: 7
//   [no-quota]      429 with code insufficient_quota: the operator's account is empty
//   [bad-request]   400 that says why
//   [denied]        401: the operator's key is wrong
//   [broken]        500
//   [nonsense]      200 with a body that is no JSON
//   [hang-up]       the connection is destroyed before any answer
//   [silent]        30 seconds of nothing, then the plain answer
//   anything else   the plain answer; 20 prompt and 9 completion tokens, as in the contract's example of a charge
//
// Of what is no conversation:
//
//   an embedding    [0.25, -0.5, 0.125] for each input; it counts no tokens
//   a picture       one, whatever number is asked for; without usage
//   speech          six bytes, as audio/mpeg; of a text with [bad-request] in it 400
//   a completion    what a chat with the prompt as its message is answered
//   a transcription "Hello there.", 2.25 seconds long and billed as 3; of listener-by-token 25 and 4 tokens
//
// A conversation that ends in a tool's result gets the plain answer. The usage is in every plain answer, and in a
// stream, as a chunk of its own, if stream_options.include_usage asks for it. The model named is the one asked for.
import { LLMock } from "@copilotkit/aimock";

const PLAIN = {
  content: "A wallet is all you need: sign in, pay for what you use, and keep the rest.",
  usage: { prompt_tokens: 20, completion_tokens: 9 },
};
const error = (status, message, code, more = {}) => ({ status, error: { message, type: "upstream_error", code }, ...more });

const server = new LLMock({ port: Number(process.env.PORT ?? 0), host: "127.0.0.1", chunkSize: 4 });

server.on({ hasToolResult: true, endpoint: "chat" }, PLAIN);
server.onMessage("[tool]", {
  toolCalls: [{ id: "call_weather", name: "get_weather", arguments: '{"city":"Lisbon"}' }],
  usage: { prompt_tokens: 40, completion_tokens: 15 },
});
server.onMessage(
  "[long]",
  { content: "To be counted, a word must be said. ".repeat(40), usage: { prompt_tokens: 20, completion_tokens: 600 } },
  { chunkSize: 12 },
);
server.onMessage("[slow]", PLAIN, { latency: 100 });
// Without the pause all chunks would still be in the server's buffer when the connection is destroyed.
server.onMessage("[cut]", PLAIN, { truncateAfterChunks: 4, latency: 20 });
server.onMessage("[rate-limited]", error(429, "Slow down.", "rate_limit_exceeded", { retryAfter: 7 }));
server.onMessage("[no-quota]", error(429, "You exceeded your current quota.", "insufficient_quota"));
server.onMessage("[bad-request]", error(400, "The messages make no sense.", "invalid_value"));
server.onMessage("[denied]", error(401, "Incorrect API key provided: sk-upstream-secret.", "invalid_api_key"));
server.onMessage("[broken]", error(500, "The server had an error.", "server_error"));
server.onMessage("[nonsense]", PLAIN, { chaos: { malformedRate: 1 } });
server.onMessage("[hang-up]", PLAIN, { chaos: { disconnectRate: 1 } });
server.onMessage("[silent]", PLAIN, { chaos: { latencyMs: 30_000 } });
server.on({ endpoint: "chat" }, PLAIN);
server.on({ endpoint: "embedding" }, { embedding: [0.25, -0.5, 0.125] });
server.on({ endpoint: "image" }, { image: { b64Json: "iVBORw0KGgo=" } });
server.on(
  { endpoint: "speech", userMessage: "[bad-request]" },
  error(400, "There is no such voice.", "invalid_value"),
);
server.on({ endpoint: "speech" }, { audio: Buffer.from("49443300ff01", "hex").toString("base64"), format: "mp3" });
const transcript = (usage) => ({ transcription: { text: "Hello there.", duration: 2.25, usage } });
server.on(
  { endpoint: "transcription", model: "listener-by-token" },
  transcript({
    type: "tokens",
    input_tokens: 25,
    input_token_details: { text_tokens: 0, audio_tokens: 25 },
    output_tokens: 4,
    total_tokens: 29,
  }),
);
server.on({ endpoint: "transcription" }, transcript({ type: "duration", seconds: 3 }));

const base = await server.start();

// Completions of the old kind it does not have: they are its answers to the same as a chat, told otherwise.
const told = (text) => {
  if (text === "[DONE]") return text;
  const answer = JSON.parse(text);
  const choice = ({ message, delta, ...rest }) => ({ text: (message ?? delta)?.content ?? "", ...rest });
  if (answer.choices) answer.choices = answer.choices.map(choice);
  return JSON.stringify({ ...answer, object: "text_completion" });
};
server.mount("/v1/completions", {
  async handleRequest(request, response) {
    const pieces = [];
    for await (const piece of request) pieces.push(piece);
    const { prompt, model, stream, stream_options } = JSON.parse(Buffer.concat(pieces));
    const messages = [{ role: "user", content: typeof prompt === "string" ? prompt : JSON.stringify(prompt) }];
    const body = JSON.stringify({ model, messages, stream, stream_options });
    const headers = { "content-type": "application/json" };
    const answer = await fetch(`${base}/v1/chat/completions`, { method: "POST", headers, body });
    const text = await answer.text();
    response.writeHead(answer.status, { "content-type": answer.headers.get("content-type") });
    const events = () => text.replace(/^data: (.*)$/gm, (_, data) => `data: ${told(data)}`);
    response.end(stream && answer.ok ? events() : answer.ok ? told(text) : text);
    return true;
  },
});

console.log(`ready ${base}`);

for (const signal of ["SIGTERM", "SIGINT"]) process.once(signal, () => server.stop().then(() => process.exit(0)));
