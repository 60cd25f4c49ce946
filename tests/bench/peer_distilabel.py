"""distilabel: its chat task in a pipeline without cache, a batch being what may be in flight."""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
os.environ["DISTILABEL_LOG_LEVEL"] = "WARNING"  # or it prints a line for every request

from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import ChatGeneration
from peer_clock import MAX_TOKENS, MODEL, measure


def run_distilabel(
    conversations: list[list[dict[str, str]]], base_url: str, in_flight: int, folder: str
) -> list[str | None]:
    with Pipeline(name="bench", cache_dir=folder) as pipeline:
        load = LoadDataFromDicts(
            data=[{"messages": messages} for messages in conversations], batch_size=in_flight
        )
        judge = ChatGeneration(
            llm=OpenAILLM(
                model=MODEL,
                base_url=base_url,
                api_key="none",
                generation_kwargs={"max_new_tokens": MAX_TOKENS, "temperature": 0.0},
            ),
            input_batch_size=in_flight,
            num_generations=1,
        )
        load >> judge
    distiset = pipeline.run(use_cache=False)
    return distiset["default"]["train"]["generation"]


if __name__ == "__main__":
    measure(run_distilabel)
