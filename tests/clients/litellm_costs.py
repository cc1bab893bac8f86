"""What LiteLLM says that requests cost, for each model of its own price list: a line of JSON each.

The first line names the list. Then come {"model", "words", "usage", "usd"}: the report of usage as a provider
writes it, in the words of one of the APIs, and the cost in USD as the shortest decimal of LiteLLM's float; or
{"model", "words", "usage", "error"} where LiteLLM has no cost for it. Nothing is asked of any network.
"""

import json
import os
import sys
from datetime import datetime, timezone

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
os.environ["LITELLM_LOG"] = "CRITICAL"

# It prints advice on standard output, which is for what is said here.
OUT, sys.stdout = sys.stdout, sys.stderr

import litellm  # noqa: E402
from litellm.llms.anthropic.chat.transformation import AnthropicConfig  # noqa: E402
from litellm.litellm_core_utils.llm_cost_calc import utils  # noqa: E402
from litellm.types.utils import Usage  # noqa: E402

# A Saturday, when all that is cheaper at times is: what comes out is the same at any hour.
utils.current_billing_time = lambda: datetime(2026, 1, 3, 12, tzinfo=timezone.utc)

LIST = os.path.join(os.path.dirname(litellm.__file__), "model_prices_and_context_window_backup.json")


def openai(prompt, completion, prompt_details=None, completion_details=None):
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    if prompt_details:
        usage["prompt_tokens_details"] = prompt_details
    if completion_details:
        usage["completion_tokens_details"] = completion_details
    return "openai", usage


CHAT = [
    openai(20, 9),
    openai(5000, 120, {"cached_tokens": 3000}, {"reasoning_tokens": 70}),
    openai(9000, 1, {"cached_tokens": 1000, "cache_write_tokens": 2500}),
    # At each threshold there is, and above it.
    openai(128_000, 700),
    openai(200_000, 700, {"cached_tokens": 50_000}),
    openai(200_001, 700, {"cached_tokens": 50_000, "cache_write_tokens": 7}, {"reasoning_tokens": 300}),
    openai(600_000, 2000, {"cached_tokens": 300_000}),
    openai(1000, 300, {"audio_tokens": 400}, {"audio_tokens": 120}),
    openai(1000, 10, {"audio_tokens": 400, "cached_tokens": 500, "cached_tokens_details": {"audio_tokens": 300}}),
    openai(1500, 10, {"image_tokens": 900}),
    (
        "anthropic",
        {
            "input_tokens": 2048,
            "cache_read_input_tokens": 1800,
            "cache_creation_input_tokens": 248,
            "cache_creation": {"ephemeral_5m_input_tokens": 148, "ephemeral_1h_input_tokens": 100},
            "output_tokens": 503,
        },
    ),
]
EMBEDDING = [("embeddings", {"prompt_tokens": 8, "total_tokens": 8}), ("embeddings", {"prompt_tokens": 8000, "total_tokens": 8000})]
TRANSCRIPTION = [("seconds", {"type": "duration", "seconds": 9}), ("seconds", {"type": "duration", "seconds": 75.25})]
SPEECH = [("characters", {"characters": 1234})]

CASES = {
    "chat": CHAT,
    "responses": CHAT,
    "embedding": EMBEDDING,
    "audio_transcription": TRANSCRIPTION,
    "audio_speech": SPEECH,
}


def cost(model, provider, words, usage):
    def ask(**rest):
        return litellm.cost_per_token(model=model, custom_llm_provider=provider, **rest)

    if words == "anthropic":
        return ask(usage_object=AnthropicConfig().calculate_usage(usage_object=usage, reasoning_content=None))
    if words == "seconds":
        return ask(call_type="transcription", audio_transcription_file_duration=usage["seconds"])
    if words == "characters":
        return ask(call_type="speech", prompt_characters=usage["characters"])
    call = "embedding" if words == "embeddings" else "completion"
    usage = Usage(**usage)
    tokens = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
    return ask(usage_object=usage, call_type=call, **tokens)


def main():
    print(json.dumps({"list": LIST}), file=OUT)
    with open(LIST, encoding="utf-8") as file:
        entries = json.load(file)
    for model, entry in entries.items():
        for words, usage in CASES.get(entry.get("mode"), []):
            row = {"model": model, "words": words, "usage": usage}
            try:
                row["usd"] = repr(sum(cost(model, entry.get("litellm_provider"), words, dict(usage))))
            except Exception as error:  # whatever it stumbles over is its answer
                row["error"] = f"{type(error).__name__}: {error}"[:200]
            print(json.dumps(row), file=OUT)


if __name__ == "__main__":
    sys.exit(main())
