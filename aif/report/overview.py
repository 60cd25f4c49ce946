"""What ran, on what, and how much came of it: the report's first page."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aif.config.price import dollars
from aif.constitution import file as constitutions
from aif.data.visible import cleaned
from aif.errors import AifError
from aif.llm.budget import cost_of, journals
from aif.report.judge_stats import Judged
from aif.report.schema import CallState, LabelState, Metric, TrainState, rows, state
from aif.run import Run
from aif.store.journal import Index
from aif.store.records import Kept, Prompt, Response, Revision

ASKING = ("respond", "revise", "filter", "resample", "label", "ppo", "evaluate")
SAMPLED = {"respond": "responses.jsonl", "resample": "resampled.jsonl"}
FILES = ("prompts.jsonl", "responses.jsonl", "revisions.jsonl", "kept.jsonl", "comparisons.jsonl")
FILES += ("human.jsonl", "verdicts.jsonl", "labels.jsonl", "metrics.jsonl", "ppo-samples.jsonl")
FILES += ("resampled.jsonl", "evaluation.jsonl", "evaluate.json", "reward-card.json")
FILES += ("audit.json",)
FILES += tuple(f"{stage}.json" for stage in (*ASKING, "compare", "sft", "reward"))


@dataclass
class Count:
    """A line of the funnel: how many there are, and what became of those that are of no use."""

    name: str
    file: str
    total: int = 0
    lost: Counter[str] = field(default_factory=Counter)

    @property
    def good(self) -> int:
        return self.total - self.lost.total()

    def add(self, lost: str | None) -> None:
        self.total += 1
        if lost:
            self.lost[lost] += 1


def what_ran(run: Run, judged: Judged) -> dict[str, Any]:
    """The run in words: `terms` are pairs, `principles` and `calls` are tables."""
    settings = cleaned(run.settings.model_dump())
    label = state(run, "label", LabelState)
    trained = {name: state(run, name, TrainState) for name in ("sft", "reward", "ppo")}
    done = {name: found for name, found in trained.items() if found}
    terms = []
    if label:
        terms += _judged_by(label)
    if run.file("responses.jsonl").exists() or done:
        terms.append(("Policy", named(settings["policy"]["model"])))
    if run.file("revisions.jsonl").exists():
        reviser = settings["reviser"] or settings["policy"]
        terms.append(("Reviser", named(reviser["model"])))
    for name, found in done.items():
        terms.append((_TRAINED[name], _training(found)))
    later = [path.parent.name for path in sorted(run.path.glob("[0-9]*/labels.jsonl"))]
    if later:
        terms.append(("Later iterations", ", ".join(f"{run.path.name}/{name}" for name in later)))
    seeds = {
        name: settings[name]["seed"]
        for name in ("respond", "revise", "label", "sft", "reward", "ppo", "evaluate")
        if run.file(f"{name}.json").exists()
    }
    if seeds:
        terms.append(("Seeds", ", ".join(f"{name} {seed}" for name, seed in seeds.items())))
    terms.append(("Versions", _versions()))
    return {
        "name": run.path.name,
        "constitution": label and label.constitution.name,
        "date": _date(run),
        "terms": terms,
        "principles": _principles(label) if label else [],
        "calls": list(_calls(run, judged)),
    }


_TRAINED = {"sft": "Fine-tuning", "reward": "Reward model", "ppo": "Reinforcement"}


def named(model: str | None) -> str:
    """A model as a page names it: of a folder the last two parts, which say nothing of a home."""
    if model and Path(model).is_absolute():
        return "/".join(Path(model).parts[-2:])
    return model or "?"


def _judged_by(label: LabelState) -> Iterator[tuple[str, str]]:
    constitution, judge = label.constitution, label.judge
    told = [constitution.name or "?"]
    told += [f"digest {constitution.digest[:12]}"] if constitution.digest else []
    told += [label.draw] if label.draw else []
    yield "Constitution", ", ".join(told)
    how = [named(judge.model), label.protocol or ""]
    how += [f"{judge.samples} samples" if (judge.samples or 1) > 1 else ""]
    yield "Judge", ", ".join(filter(None, how))
    if label.hard_verdicts:
        yield (
            "Soft labels",
            f"{label.hard_verdicts:,} verdicts are parsed text, not log-probabilities: coarse",
        )


def _training(found: TrainState) -> str:
    if found.in_progress and found.steps is None:
        return "begun, not done"
    facts = [found.algorithm.upper() if found.algorithm else ""]
    facts += [f"from {named(found.start)}" if found.start else ""]
    facts += [f"{found.examples:,} examples" if found.examples else ""]
    facts += [f"{found.pairs:,} comparisons" if found.pairs else ""]
    facts += [f"{found.prompts:,} prompts" if found.prompts else ""]
    facts += [f"{found.steps:,} steps" if found.steps is not None else ""]
    facts += [f"ends with step {found.best_step:,}" if found.best_step is not None else ""]
    return ", ".join(filter(None, facts))


def _versions() -> str:
    """Of what made the page, and of what is installed beside it; nothing is imported for it."""
    found = [f"Python {platform.python_version()}"]
    for package in ("aif", "matplotlib", "torch", "transformers"):
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def _date(run: Run) -> str:
    """When the newest of the run's files was written, so that the same files make the same page."""
    times = [path.stat().st_mtime for name in FILES if (path := run.file(name)).exists()]
    return f"{datetime.fromtimestamp(max(times), UTC):%Y-%m-%d %H:%M} UTC" if times else ""


def _principles(label: LabelState) -> list[dict[str, Any]]:
    """Each with its weight and question, where the constitution is still what the labels used."""
    found = label.constitution
    asked: dict[str, Any] = {}
    with suppress(AifError):
        constitution = constitutions.load(Path(found.file or ""))
        if constitution.digest() == found.digest:
            asked = {p.id: p for p in constitution.principle}
    return [
        {
            "id": name,
            "weight": asked[name].weight if name in asked else None,
            "question": cleaned(
                asked[name].question(label.protocol or "") if name in asked else None
            ),
        }
        for name in found.principles
    ]


def _calls(run: Run, judged: Judged) -> Iterator[dict[str, Any]]:
    """What the journals hold, a row a stage."""
    for stage in ASKING:
        found = [run.index(stage)]
        if stage == "evaluate":  # each policy and the matches are runs of their own
            found = [Index.read(path) for path in journals(run.file("evaluation"))]
        row = {
            "answers": sum(len(index.answered) for index in found),
            "failed": sum(len(index.failed) for index in found),
            "damaged": sum(len(index.damage) for index in found),
        }
        if any(row.values()):
            cost = cost_of(run, stage)
            told = None if cost is None else dollars(cost)
            yield {"stage": stage, **row, "tokens": _tokens(run, stage, judged), "cost": told}


def _tokens(run: Run, stage: str, judged: Judged) -> dict[str, int]:
    """Of the answers that count now."""
    if stage == "label":
        return dict(judged.tokens)
    if stage in SAMPLED:
        total: Counter[str] = Counter()
        for response in rows(run, SAMPLED[stage], Response):
            total.update(response.usage)
        return dict(total)
    found = state(run, stage, CallState)
    return found.tokens if found else {}


def funnel(run: Run, judged: Judged) -> list[Count]:
    """From prompts to episodes, each with what was lost and why."""
    null = Counter(label.fault for label in judged.labels.values() if label.fault)
    counts = [
        _counted(run, "Prompts", "prompts.jsonl", Prompt, lambda row: None),
        _counted(run, "Responses", "responses.jsonl", Response, lambda row: row.fault),
        _counted(run, "After fine-tuning", "resampled.jsonl", Response, lambda row: row.fault),
        _counted(run, "Revisions", "revisions.jsonl", Revision, lambda row: row.fault),
        _counted(
            run, "Revisions kept", "kept.jsonl", Kept,
            lambda row: row.fault or (None if row.kept else "not preferred"),
        ),
        Count("Comparisons", "comparisons.jsonl", len(judged.words)),
        Count("Verdicts", "verdicts.jsonl", judged.verdicts, judged.faults),
        Count("Labels", "labels.jsonl", len(judged.labels), null),
    ]  # fmt: skip
    reward = state(run, "reward", TrainState)
    if reward and reward.pairs is not None:
        counts.append(Count("Pairs learned from", "reward.json", reward.pairs))
        counts.append(Count("Pairs held out", "reward.json", reward.eval_pairs or 0))
    episodes = [
        row.value or 0
        for row in rows(run, "metrics.jsonl", Metric)
        if (row.stage, row.name) == ("ppo", "episode")
    ]
    if episodes:
        counts.append(Count("PPO episodes", "metrics.jsonl", int(max(episodes))))
    return [count for count in counts if count.total]


def _counted(run: Run, name: str, file: str, kind: type, lost: Any) -> Count:
    count = Count(name, file)
    for row in rows(run, file, kind):
        count.add(lost(row))
    return count
