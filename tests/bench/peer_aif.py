"""aif: the whole `label` stage, from the pairs file to labels.jsonl, every answer durable."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from peer_clock import MAX_TOKENS, MODEL, measure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import aif.llm.openai_api
from aif.cli.options import open_run
from aif.progress import Progress
from aif.stages.label import label


def run_aif(
    conversations: list[list[dict[str, str]]], base_url: str, in_flight: int, folder: str
) -> list[str | None]:
    """Asks what `conversations` holds: `api_overhead.py` rendered them from the same pairs."""
    inputs = Path(sys.argv[1]).parent
    given = {
        "label.pairs": str(inputs / "pairs.jsonl"),
        "label.constitution": str(inputs / "constitution.toml"),
        "judge.model": f"openai:{MODEL}",
        "judge.base_url": base_url,
        "judge.concurrency": in_flight,
        "judge.logprobs": False,  # the peers do not ask for them either
        "judge.max_tokens": MAX_TOKENS,
    }
    run = Path(folder) / "run"
    label(open_run(run, given), Progress(quiet=True))
    return [json.loads(line)["text"] for line in (run / "verdicts.jsonl").open()]


if __name__ == "__main__":
    assert aif.llm.openai_api  # imported before the clock starts, like every contender's client
    measure(run_aif)
