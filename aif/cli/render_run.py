"""What `aif run` ends with: where the policy stood, where it stands, and what it says now."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from aif.cli.render_evaluate import standing
from aif.data.visible import visible
from aif.run import Run
from aif.store import jsonl
from aif.store.records import Prompt

SHOWN = 3  # prompts with their responses before and after
WIDTH = 240  # characters of a text


def lines(run: Run, summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """For a person; `summaries` are those of the stages that were done now."""
    did = ", ".join(summaries) or "nothing, as nothing has changed"
    told = [f"{run.path}: done: {did}"]
    found = run.state("evaluate")
    if found.get("policies"):
        told += ["", *standing(found), *_samples(run, found)]
    report = run.file("report.html")
    return [*told, "", str(report)] if report.exists() else told


def _samples(run: Run, found: Mapping[str, Any]) -> list[str]:
    """The first prompts, answered by the policy it is against and by the last one that learned."""
    before = found["against"]
    names = [policy["name"] for policy in found["policies"] if policy["name"].endswith("ppo")]
    path = run.file("evaluation.jsonl")
    if not names or not path.exists():
        return []
    rows = (row for _, row in jsonl.read(path))
    texts = {(row["policy"], row["prompt_id"]): row["response"] for row in rows}
    told = []
    for _, row in islice(jsonl.read(run.file("evaluation") / "prompts.jsonl"), SHOWN):
        prompt = Prompt.of(row["prompt"])
        told += ["", f"> {_short(prompt.messages[-1]['content'])}"]
        for name in (before, names[-1]):
            told.append(f"  {name}: {_short(texts.get((name, prompt.id)))}")
    return told


def _short(text: str | None) -> str:
    plain = visible(" ".join((text or "-").split()))
    return plain if len(plain) <= WIDTH else plain[: WIDTH - 1] + "…"
