"""The official Anthropic SDK for Python against the gateway, over upstreams of every kind: only its base URL is changed.

FAREBOX_URL API_KEY MODELS     MODELS: {"what the upstream speaks": "the model's id", …}
The upstream is model_server.mjs: the words in brackets are its triggers.
"""

import json
import os

import anthropic
from checks import check, program, same

MODELS = json.loads(os.environ["MODELS"])
PLAIN = "A wallet is all you need: sign in, pay for what you use, and keep the rest."
WEATHER = {
    "name": "get_weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def client(api_key):
    return anthropic.Anthropic(api_key=api_key, base_url=os.environ["FAREBOX_URL"], max_retries=0, timeout=20)


rich = client(os.environ["API_KEY"])


def ask(model, content, **more):
    return {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 64, **more}


def plain(model):
    raw = rich.messages.with_raw_response.create(**ask(model, "Hello"))
    answer = raw.parse()
    same(f"{model}: the answer", answer.content[0].text, PLAIN)
    same("its model", answer.model, model)
    same("usage.charged_usdc", answer.usage.charged_usdc, int(raw.headers["x-charged-usdc"]))
    same("the charge", answer.usage.charged_usdc, 11)


def streams(model):
    with rich.messages.stream(**ask(model, "Hello")) as stream:
        pieces = list(stream.text_stream)
        message = stream.get_final_message()
    check(f"{model}, streamed: several pieces", len(pieces) > 3, pieces)
    same("the same text", "".join(pieces), PLAIN)
    same("why it stopped", message.stop_reason, "end_turn")
    same("its output tokens", message.usage.output_tokens, 9)


def tools(model):
    question = ask(model, "[tool] What is the weather?", tools=[WEATHER])
    answer = rich.messages.create(**question)
    call = next(block for block in answer.content if block.type == "tool_use")
    same(f"{model}: the tool's input", call.input, {"city": "Lisbon"})
    same("why it stopped", answer.stop_reason, "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny"}
    question["messages"] += [
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    same("after the tool's result", rich.messages.create(**question).content[0].text, PLAIN)


def errors(model):
    def refused(what, kind, by=rich, **more):
        try:
            by.messages.create(**{**ask(model, "Hello"), **more})
        except anthropic.APIStatusError as error:
            return check(f"{what}: {kind.__name__}", isinstance(error, kind), f"{type(error)} {error.body}")
        return check(f"{what} is refused", False)

    def told(trigger):
        return [{"role": "user", "content": trigger}]

    refused("a wrong key", anthropic.AuthenticationError, by=client("sk-" + "0" * 64))
    refused("an unknown model", anthropic.NotFoundError, model="openai/gpt-0")
    refused("too many tokens", anthropic.BadRequestError, max_tokens=10_000_000)
    refused("an upstream's 429", anthropic.RateLimitError, messages=told("[rate-limited]"))
    refused("an upstream's 400", anthropic.BadRequestError, messages=told("[bad-request]"))
    refused("an upstream's 500", anthropic.InternalServerError, messages=told("[broken]"))


@program
def main():
    for model in MODELS.values():
        plain(model)
        streams(model)
        tools(model)
        errors(model)
        counted = rich.messages.count_tokens(model=model, messages=[{"role": "user", "content": "Hello"}])
        check(f"{model}: tokens are counted", counted.input_tokens > 0, counted)
