"""bespokelabs-curator, its rate limits out of the way, its cache in a new folder."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

os.environ |= {"TELEMETRY_ENABLED": "false", "CURATOR_DISABLE_RICH_DISPLAY": "1"}
os.environ |= {"CURATOR_DISABLE_CACHE": "1", "CURATOR_VIEWER": "0", "HF_HUB_OFFLINE": "1"}
# It counts tokens with tiktoken, which would fetch its vocabulary; litellm, which it needs, has it.
LITELLM = Path(find_spec("litellm").origin).parent
os.environ["TIKTOKEN_CACHE_DIR"] = str(LITELLM / "litellm_core_utils" / "tokenizers")

from bespokelabs import curator  # noqa: E402
from datasets import Dataset  # noqa: E402
from peer_clock import MAX_TOKENS, MODEL, measure  # noqa: E402


class Judge(curator.LLM):
    def prompt(self, input: dict) -> list[dict[str, str]]:
        return input["messages"]

    def parse(self, input: dict, response: str) -> dict:
        return {"text": response}


def run_curator(
    conversations: list[list[dict[str, str]]], base_url: str, in_flight: int, folder: str
) -> list[str | None]:
    judge = Judge(
        model_name=MODEL,
        backend="openai",
        generation_params={"max_tokens": MAX_TOKENS, "temperature": 0.0},
        backend_params={
            "base_url": base_url,
            "api_key": "none",
            "max_requests_per_minute": 10_000_000,
            "max_tokens_per_minute": 1_000_000_000,
            "max_concurrent_requests": in_flight,
            "require_all_responses": False,
        },
    )
    rows = judge(Dataset.from_dict({"messages": conversations}), working_dir=folder)
    return [row["text"] for row in rows.dataset]


if __name__ == "__main__":
    measure(run_curator)
