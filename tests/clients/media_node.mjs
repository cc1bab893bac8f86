// Completions of the old kind, embeddings, pictures, speech and transcriptions by the official OpenAI SDK for Node: only its base URL is changed.
//   FAREBOX_URL API_KEY
// The upstream is model_server.mjs; the models are those of tests/support/media.rs.
import OpenAI, { toFile } from "openai";
import { check, env, run, same, url, wav } from "./lib.mjs";

const openai = new OpenAI({ apiKey: env("API_KEY"), baseURL: url("/v1"), maxRetries: 0, timeout: 20_000 });
const charged = (response) => Number(response.headers.get("x-charged-usdc"));
const sound = (ms) => toFile(wav(ms), "sound.wav", { type: "audio/wav" });

async function embeddings() {
  // The SDK asks for base64 by itself, which this model server does not speak.
  const floats = { model: "openai/embedder", encoding_format: "float" };
  const one = await openai.embeddings.create({ ...floats, input: "Hello" }).withResponse();
  same("an embedding", one.data.data[0].embedding, [0.25, -0.5, 0.125]);
  same("its model", one.data.model, "openai/embedder");
  same("a call is charged", [one.data.usage.charged_usdc, charged(one.response)], [120, 120]);
  const many = await openai.embeddings.create({ ...floats, input: [[1, 2], [3]], dimensions: 3 });
  same("one for each input", many.data.length, 2);
}

async function completions() {
  const ask = { model: "openai/gpt-5-mini", prompt: "A wallet is", max_tokens: 64 };
  const whole = await openai.completions.create(ask).withResponse();
  check("a completion", whole.data.choices[0].text.startsWith("A wallet"), whole.data);
  same("its model and charge", [whole.data.model, whole.data.usage.charged_usdc], [ask.model, 11]);
  const chunks = [];
  for await (const chunk of await openai.completions.create({ ...ask, stream: true })) chunks.push(chunk);
  same("the same in pieces", chunks.map((chunk) => chunk.choices[0].text).join(""), whole.data.choices[0].text);
}

async function pictures() {
  const ask = { model: "openai/painter", prompt: "A wallet", size: "1024x1024" };
  const one = await openai.images.generate({ ...ask, quality: "standard", n: 2 }).withResponse();
  same("a picture", one.data.data[0].b64_json, "iVBORw0KGgo=");
  same("the one that came is charged", charged(one.response), 48_000);
  const image = await toFile(Buffer.from("iVBORw0KGgo=", "base64"), "a.png", { type: "image/png" });
  const changed = await openai.images.edit({ ...ask, quality: "hd", image: [image, image] }).withResponse();
  same("a picture changed", [changed.data.data.length, charged(changed.response)], [1, 96_000]);
  const refused = await openai.images.generate({ ...ask, size: "1x1" }).catch((error) => error);
  same("a size without a price", [refused.status, refused.param], [400, "size"]);
}

async function speech() {
  const spoken = await openai.audio.speech.create({ model: "openai/voice", input: "Hello", voice: "alloy" });
  same("its type", spoken.headers.get("content-type"), "audio/mpeg");
  same("its bytes", Buffer.from(await spoken.arrayBuffer()).toString("hex"), "49443300ff01");
  same("five characters are charged", charged(spoken), 90);
  const refused = await openai.audio.speech
    .create({ model: "openai/voice", input: "[bad-request]", voice: "alloy" })
    .catch((error) => error);
  same("what the provider refuses", refused.status, 400);
}

async function transcriptions() {
  const ask = async (more) => ({ file: await sound(2500), model: "openai/listener", ...more });
  const plain = await openai.audio.transcriptions.create(await ask()).withResponse();
  same("a transcript", plain.data.text, "Hello there.");
  same("as long as it is said to be", [plain.data.usage.charged_usdc, charged(plain.response)], [360, 360]);
  const verbose = await openai.audio.transcriptions
    .create(await ask({ response_format: "verbose_json", timestamp_granularities: ["word", "segment"] }))
    .withResponse();
  same("as long as it is heard to be", [verbose.data.duration, charged(verbose.response)], [2.25, 270]);
  const streamed = [];
  const stream = await openai.audio.transcriptions.create(
    await ask({ model: "openai/listener-by-token", stream: true }),
  );
  for await (const event of stream) streamed.push(event);
  same("its text", streamed.slice(0, -1).map((event) => event.delta).join(""), "Hello there.");
  same("its last event", streamed.at(-1).type, "transcript.text.done");
  // 25 tokens heard at $6 and 4 written at $10 a million, and a fifth more.
  same("tokens are charged", streamed.at(-1).usage.charged_usdc, 228);
  const refused = await openai.audio.transcriptions
    .create({ file: await toFile(Buffer.from("text"), "a.wav"), model: "openai/listener" })
    .catch((error) => error);
  same("what is no sound", [refused.status, refused.param], [400, "file"]);
}

run(async () => {
  await completions();
  await embeddings();
  await pictures();
  await speech();
  await transcriptions();
  check("all of it", true);
});
