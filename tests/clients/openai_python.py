"""The official OpenAI SDK for Python against the gateway: only its base URL is changed.

FAREBOX_URL API_KEY MODEL [POOR_API_KEY]     POOR_API_KEY is a key of a wallet without a balance
The upstream is model_server.mjs: the words in brackets are its triggers.
"""

import json
import os
import re

import openai
from checks import check, program, same

MODEL = os.environ["MODEL"]
BASE_URL = os.environ["FAREBOX_URL"] + "/v1"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def client(api_key):
    return openai.OpenAI(api_key=api_key, base_url=BASE_URL, max_retries=0, timeout=20)


rich = client(os.environ["API_KEY"])


def ask(content, **more):
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 64, **more}


def plain():
    raw = rich.chat.completions.with_raw_response.create(**ask("Hello"))
    answer = raw.parse()
    check("plain: an answer", answer.choices[0].message.content, answer)
    same("its model", answer.model, MODEL)
    check("x-request-id is there", raw.headers.get("x-request-id"))
    check("x-charged-usdc is a charge", re.fullmatch(r"[1-9]\d*", raw.headers.get("x-charged-usdc", "")))
    check("x-balance-usdc is a balance", re.fullmatch(r"\d+", raw.headers.get("x-balance-usdc", "")))
    same("usage.charged_usdc", answer.usage.charged_usdc, int(raw.headers["x-charged-usdc"]))

    following = rich.chat.completions.with_raw_response.create(**ask("Hello again"))
    fell = int(raw.headers["x-balance-usdc"]) - int(following.headers["x-balance-usdc"])
    same("the balance fell by", fell, following.parse().usage.charged_usdc)


def streams():
    def read(**more):
        return list(rich.chat.completions.create(**ask("Hello", stream=True, **more)))

    def text(chunks):
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    silent = read()
    check("stream: several chunks", len(silent) > 3, len(silent))
    check("its text", text(silent), silent)
    check("every chunk names the model", all(chunk.model == MODEL for chunk in silent), silent[0])
    check("no usage unasked", all(chunk.usage is None and chunk.choices for chunk in silent), silent[-1])

    counted = read(stream_options={"include_usage": True})
    same("the same text with usage asked", text(counted), text(silent))
    same("usage chunks", sum(chunk.usage is not None for chunk in counted), 1)
    check("the last chunk is the usage", counted[-1].usage and counted[-1].usage.total_tokens > 0, counted[-1])
    same("its choices", counted[-1].choices, [])


def tools():
    answer = rich.chat.completions.create(**ask("[tool] What is the weather?", tools=[WEATHER]))
    same("tools: the finish reason", answer.choices[0].finish_reason, "tool_calls")
    call = answer.choices[0].message.tool_calls[0]
    same("the tool's name", call.function.name, "get_weather")
    same("its arguments", json.loads(call.function.arguments), {"city": "Lisbon"})


def models():
    row = next((row for row in rich.models.list() if row.id == MODEL), None)
    check("models: ours is listed", row and row.object == "model" and row.owned_by, row)
    check("with what it costs", float(row.pricing["prompt"]) > 0 and float(row.pricing["completion"]) > 0, row)


def errors():
    def refused(what, kind, status, code=None, param=None, by=rich, **more):
        try:
            answer = by.chat.completions.create(**{**ask("Hello"), **more})
        except openai.APIStatusError as error:
            seen = f"{type(error).__name__} {error.status_code} {error.body}"
            check(f"{what}: {kind.__name__} {status}", isinstance(error, kind) and error.status_code == status, seen)
            if code:
                same("its code", error.code, code)
            if param:
                same("its param", error.param, param)
            check("it has a request id", error.request_id)
            return error
        return check(f"{what} is refused", False, answer)

    def told(trigger):
        return [{"role": "user", "content": trigger}]

    refused("a wrong key", openai.AuthenticationError, 401, by=client("sk-" + "0" * 64))
    refused("an unknown model", openai.NotFoundError, 404, "model_not_found", model="openai/gpt-0")
    refused("too many tokens", openai.BadRequestError, 400, param="max_tokens", max_tokens=10_000_000)
    refused(
        "reasoning_effort",
        openai.BadRequestError,
        400,
        "unsupported_parameter",
        "reasoning_effort",
        reasoning_effort="low",
    )
    if poor_key := os.environ.get("POOR_API_KEY"):
        poor = refused(
            "an empty wallet", openai.APIStatusError, 402, "insufficient_balance", by=client(poor_key)
        )
        same("its type", poor.type, "billing_error")
        check("it brings the terms of a top-up", poor.response.headers.get("payment-required"))
    limited = refused("an upstream 429", openai.RateLimitError, 429, messages=told("[rate-limited]"))
    same("its retry-after", limited.response.headers.get("retry-after"), "7")
    refused("an upstream 400", openai.BadRequestError, 400, messages=told("[bad-request]"))
    refused("an upstream 500", openai.InternalServerError, 502, messages=told("[broken]"))

    seen = []
    try:
        for chunk in rich.chat.completions.create(**ask("[cut]", stream=True)):
            seen.append(chunk)
    except openai.APIError as error:
        check("a stream cut upstream: an APIError after some chunks", seen, error)
    else:
        check("a stream cut upstream ends in an error", False, len(seen))


@program
def main():
    plain()
    streams()
    tools()
    models()
    errors()
