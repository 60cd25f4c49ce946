"""Pair the responses of each prompt: responses.jsonl -> comparisons.jsonl. No model is asked.

It uses the responses of the fine-tuned policy (resampled.jsonl) if there are any. Responses with a
fault are left out, and equal texts count once. All pairs of the rest become comparisons, or
`compare.per_prompt` of them, drawn by seed.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from aif.errors import InputError
from aif.progress import Progress
from aif.run import Run
from aif.store.records import Comparison, Prompt, Response

STAGE = "compare"


def compare(run: Run, progress: Progress) -> dict[str, Any]:
    """Write comparisons.jsonl; returns the summary."""
    with run.writing():
        prompts = list(run.read("prompts.jsonl", Prompt))
        texts: dict[str, dict[str, None]] = defaultdict(dict)  # insertion-ordered sets
        for response in run.read(run.sampled, Response):
            if response.fault is None and response.text:
                texts[response.prompt_id][response.text] = None
        rows = [row for prompt in prompts for row in pairs(run, prompt, list(texts[prompt.id]))]
        if not rows:
            raise InputError(
                run.path / run.sampled,
                "",
                got="no prompt with two different responses",
                expected="at least one (respond.samples >= 2)",
            )
        run.write("comparisons.jsonl", rows)
        compared = len({row.prompt_id for row in rows})
        summary = {
            "run": str(run.path),
            "of": run.sampled,
            "comparisons": len(rows),
            "prompts_compared": compared,
            "prompts_without_a_pair": len(prompts) - compared,
        }
        run.write_state(STAGE, summary)
    progress.say(f"compare: {len(rows):,} comparisons of {compared:,} prompts, of {run.sampled}")
    return summary


def pairs(run: Run, prompt: Prompt, texts: list[str]) -> Iterator[Comparison]:
    """The comparisons of one prompt's texts: all pairs, or a draw of `compare.per_prompt`."""
    settings = run.settings.compare
    every = list(combinations(texts, 2))
    if settings.per_prompt is not None and settings.per_prompt < len(every):
        draw = random.Random(f"{settings.seed}:{prompt.id}")
        every = draw.sample(every, settings.per_prompt)
    for first, second in every:
        yield Comparison.of(prompt.messages, first, second)
