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
from aif.report.judge_stats import LabelSurvey
from aif.report.schema import CallState, LabelState, TrainState, rows, state
from aif.run import Run
from aif.store.journal import Index
from aif.store.records import Kept, Prompt, Response, Revision
from aif.train.metrics import Metric

ASKING = ("respond", "revise", "filter", "resample", "label", "ppo", "evaluate")
SAMPLED = {"respond": "responses.jsonl", "resample": "resampled.jsonl"}
FILES = ("prompts.jsonl", "responses.jsonl", "revisions.jsonl", "kept.jsonl", "comparisons.jsonl")
FILES += ("human.jsonl", "verdicts.jsonl", "labels.jsonl", "metrics.jsonl", "ppo-samples.jsonl")
FILES += ("resampled.jsonl", "evaluation.jsonl", "evaluate.json", "reward-card.json")
FILES += ("audit.json",)
FILES += tuple(f"{stage}.json" for stage in (*ASKING, "compare", "sft", "reward"))


@dataclass
class Count:
    """A line of the funnel: how many there are, and how many of them are lost, by reason."""

    name: str
    total: int = 0
    lost: Counter[str] = field(default_factory=Counter)

    @property
    def good(self) -> int:
        return self.total - self.lost.total()


def what_ran(run: Run, labels: LabelSurvey) -> dict[str, Any]:
    """The run in words: `terms` are pairs, `principles` and `calls` are tables."""
    settings = cleaned(run.settings.model_dump())
    label = state(run, "label", LabelState)
    trained = {name: state(run, name, TrainState) for name in _TRAINED}
    trained = {name: kept for name, kept in trained.items() if kept}
    terms = []
    if label:
        terms += _judged_by(label)
    if run.file("responses.jsonl").exists() or trained:
        terms.append(("Policy", named(settings["policy"]["model"])))
    if run.file("revisions.jsonl").exists():
        reviser = settings["reviser"] or settings["policy"]
        terms.append(("Reviser", named(reviser["model"])))
    terms += [(_TRAINED[name], _training(kept)) for name, kept in trained.items()]
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
        "calls": list(_calls(run, labels)),
    }


_TRAINED = {"sft": "Fine-tuning", "reward": "Reward model", "ppo": "Reinforcement"}


def named(model: str | None) -> str:
    """A model's name on the page: of a folder only the last two parts, to hide the home folder."""
    if model and Path(model).is_absolute():
        return "/".join(Path(model).parts[-2:])
    return model or "?"


def _judged_by(label: LabelState) -> Iterator[tuple[str, str]]:
    constitution, judge = label.constitution, label.judge
    facts = [constitution.name or "?"]
    facts += [f"digest {constitution.digest[:12]}"] if constitution.digest else []
    facts += [label.draw] if label.draw else []
    yield "Constitution", ", ".join(facts)
    how = [named(judge.model), label.protocol or ""]
    how += [f"{judge.samples} samples" if (judge.samples or 1) > 1 else ""]
    yield "Judge", ", ".join(filter(None, how))
    if label.hard_verdicts:
        yield (
            "Soft labels",
            f"{label.hard_verdicts:,} verdicts are parsed text, not log-probabilities: coarse",
        )


def _training(state: TrainState) -> str:
    if state.in_progress and state.steps is None:
        return "begun, not done"
    facts = [state.algorithm.upper()] if state.algorithm else []
    facts += [f"from {named(state.start)}"] if state.start else []
    facts += [f"{state.examples:,} examples"] if state.examples else []
    facts += [f"{state.pairs:,} comparisons"] if state.pairs else []
    facts += [f"{state.prompts:,} prompts"] if state.prompts else []
    facts += [f"{state.steps:,} steps"] if state.steps is not None else []
    facts += [f"ends with step {state.best_step:,}"] if state.best_step is not None else []
    return ", ".join(facts)


def _versions() -> str:
    """The versions of the packages that are installed; none of them is imported."""
    versions = [f"Python {platform.python_version()}"]
    for package in ("aif", "matplotlib", "torch", "transformers"):
        with suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return ", ".join(versions)


def _date(run: Run) -> str:
    """The time of the newest file of the run, so that the same files make the same page."""
    times = [path.stat().st_mtime for name in FILES if (path := run.file(name)).exists()]
    return f"{datetime.fromtimestamp(max(times), UTC):%Y-%m-%d %H:%M} UTC" if times else ""


def _principles(label: LabelState) -> list[dict[str, Any]]:
    """Each principle; with its weight and question if the labels used the constitution as it is."""
    used, principles = label.constitution, {}
    with suppress(AifError):
        constitution = constitutions.load(Path(used.file or ""))
        if constitution.digest() == used.digest:
            principles = {p.id: p for p in constitution.principle}
    return [
        {
            "id": name,
            "weight": p.weight if (p := principles.get(name)) else None,
            "question": cleaned(p.question(label.protocol or "")) if p else None,
        }
        for name in used.principles
    ]


def _calls(run: Run, labels: LabelSurvey) -> Iterator[dict[str, Any]]:
    """The answers in the journals, a row for each stage."""
    for stage in ASKING:
        indexes = [run.index(stage)]
        if stage == "evaluate":  # each policy and the matches are runs of their own
            indexes = [Index.read(path) for path in journals(run.file("evaluation"))]
        row = {
            "answers": sum(len(index.answered) for index in indexes),
            "failed": sum(len(index.failed) for index in indexes),
            "damaged": sum(len(index.damage) for index in indexes),
        }
        if any(row.values()):
            spent = cost_of(run, stage)
            cost = None if spent is None else dollars(spent)
            yield {"stage": stage, **row, "tokens": _tokens(run, stage, labels), "cost": cost}


def _tokens(run: Run, stage: str, labels: LabelSurvey) -> dict[str, int]:
    """The tokens of the answers that count now."""
    if stage == "label":
        return dict(labels.verdicts.paid.tokens)
    if stage in SAMPLED:
        total: Counter[str] = Counter()
        for response in rows(run, SAMPLED[stage], Response):
            total.update(response.usage)
        return dict(total)
    calls = state(run, stage, CallState)
    return calls.tokens if calls else {}


def funnel(run: Run, labels: LabelSurvey) -> list[Count]:
    """The counts from prompts to episodes, each with its losses by reason."""
    null = Counter(label.fault for label in labels.labels.values() if label.fault)
    verdicts = labels.verdicts.of()
    counts = [
        _counted(run, "Prompts", "prompts.jsonl", Prompt, lambda row: None),
        _counted(run, "Responses", "responses.jsonl", Response, lambda row: row.fault),
        _counted(run, "After fine-tuning", "resampled.jsonl", Response, lambda row: row.fault),
        _counted(run, "Revisions", "revisions.jsonl", Revision, lambda row: row.fault),
        _counted(
            run, "Revisions kept", "kept.jsonl", Kept,
            lambda row: row.fault or (None if row.kept else "not preferred"),
        ),
        Count("Comparisons", len(labels.words)),
        Count("Verdicts", verdicts.verdicts, verdicts.faults),
        Count("Labels", len(labels.labels), null),
    ]  # fmt: skip
    reward = state(run, "reward", TrainState)
    if reward and reward.pairs is not None:
        counts.append(Count("Pairs learned from", reward.pairs))
        counts.append(Count("Pairs held out", reward.eval_pairs or 0))
    episodes = [
        row.value or 0
        for row in rows(run, "metrics.jsonl", Metric)
        if (row.stage, row.name) == ("ppo", "episode")
    ]
    if episodes:
        counts.append(Count("PPO episodes", int(max(episodes))))
    return [count for count in counts if count.total]


def _counted(run: Run, name: str, file: str, kind: type, lost: Any) -> Count:
    """The rows of a file; `lost` gives the reason why a row is lost, or None."""
    reasons = [lost(row) for row in rows(run, file, kind)]
    return Count(name, len(reasons), Counter(filter(None, reasons)))
