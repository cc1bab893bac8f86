"""Completions of the old kind, embeddings, pictures, speech and transcriptions by the official OpenAI SDK for Python: only its base URL is changed.

FAREBOX_URL API_KEY
The upstream is model_server.mjs; the models are those of tests/support/media.rs.
"""

import base64
import os
import struct

import openai
from checks import check, program, same

client = openai.OpenAI(
    api_key=os.environ["API_KEY"], base_url=os.environ["FAREBOX_URL"] + "/v1", max_retries=0, timeout=20
)


def wav(ms):
    """Silence: 16,000 samples of 16 bits a second."""
    size = ms * 32
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", size + 36, b"WAVE", b"fmt ", 16, 1, 1, 16000, 32000, 2, 16, b"data", size)
    return ("sound.wav", head + bytes(size), "audio/wav")


def charged(raw):
    return int(raw.headers["x-charged-usdc"])


def embeddings():
    raw = client.embeddings.with_raw_response.create(model="openai/embedder", input="Hello")
    same("an embedding", raw.parse().data[0].embedding, [0.25, -0.5, 0.125])
    same("a call is charged", [raw.parse().usage.charged_usdc, charged(raw)], [120, 120])
    many = client.embeddings.create(model="openai/embedder", input=["Hello", "you"])
    same("one for each input", len(many.data), 2)


def completions():
    ask = {"model": "openai/gpt-5-mini", "prompt": "A wallet is", "max_tokens": 64}
    whole = client.completions.create(**ask)
    check("a completion", whole.choices[0].text.startswith("A wallet"), whole)
    same("its charge", whole.usage.charged_usdc, 11)
    chunks = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    same("the same in pieces", "".join(c.choices[0].text for c in chunks if c.choices), whole.choices[0].text)
    same("its usage, asked for", chunks[-1].usage.total_tokens, 29)


def pictures():
    ask = {"model": "openai/painter", "prompt": "A wallet", "size": "1024x1024"}
    raw = client.images.with_raw_response.generate(**ask, quality="standard")
    same("a picture", raw.parse().data[0].b64_json, "iVBORw0KGgo=")
    same("it is charged", charged(raw), 48_000)
    image = ("a.png", base64.b64decode("iVBORw0KGgo="), "image/png")
    raw = client.images.with_raw_response.edit(**ask, quality="hd", image=[image, image], mask=image)
    same("a picture changed", [len(raw.parse().data), charged(raw)], [1, 96_000])


def speech():
    with client.audio.speech.with_streaming_response.create(
        model="openai/voice", input="Grüße", voice="alloy", response_format="mp3", speed=1.5
    ) as spoken:
        same("its type", spoken.headers["content-type"], "audio/mpeg")
        same("five characters are charged", int(spoken.headers["x-charged-usdc"]), 90)
        same("its bytes", spoken.read().hex(), "49443300ff01")


def transcriptions():
    def ask(**more):
        return client.audio.transcriptions.with_raw_response.create(
            **{"file": wav(2500), "model": "openai/listener", **more}
        )

    plain = ask(language="en", temperature=0, prompt="Farebox")
    same("a transcript", plain.parse().text, "Hello there.")
    same("as long as it is said to be", charged(plain), 360)
    verbose = ask(response_format="verbose_json", timestamp_granularities=["word"])
    same("as long as it is heard to be", [verbose.parse().duration, charged(verbose)], [2.25, 270])
    tokens = ask(model="openai/listener-by-token", include=["logprobs"])
    same("tokens are charged", [tokens.parse().usage.total_tokens, charged(tokens)], [29, 228])
    stream = client.audio.transcriptions.create(file=wav(2500), model="openai/listener-by-token", stream=True)
    events = list(stream)
    same("its text", "".join(event.delta for event in events[:-1]), "Hello there.")
    same("its last event", events[-1].usage.charged_usdc, 228)


def refused():
    def error(call):
        try:
            call()
        except openai.APIStatusError as error:
            return [error.status_code, error.param]
        return None

    same(
        "what is no sound",
        error(lambda: client.audio.transcriptions.create(file=("a.wav", b"text"), model="openai/listener")),
        [400, "file"],
    )
    same(
        "a model for something else",
        error(lambda: client.embeddings.create(model="openai/voice", input="Hello")),
        [400, "model"],
    )


def main():
    completions()
    embeddings()
    pictures()
    speech()
    transcriptions()
    refused()
    check("all of it", True)


program(main)
