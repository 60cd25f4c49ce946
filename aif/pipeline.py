"""The stages, in their order: each reads files of the run folder and writes others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from aif.progress import Progress
from aif.run import Run


@dataclass(frozen=True, slots=True)
class Stage:
    """A verb of a run: `aif.MODULE.NAME(run, progress)` makes `writes` from `reads`."""

    name: str
    reads: str
    writes: str
    module: str = ""  # where it is not called as the stage is

    def function(self) -> Callable[[Run, Progress], dict[str, Any]]:
        """The stage's function; its module is imported only now."""
        return getattr(import_module(f"aif.{self.module or self.name}"), self.name)


STAGES = (
    Stage("respond", "respond.prompts", "responses.jsonl"),
    Stage("vote", "responses.jsonl", "votes.jsonl"),
    Stage("revise", "responses.jsonl", "revisions.jsonl"),
    Stage("filter", "revisions.jsonl", "kept.jsonl"),
    Stage("sft", "revisions.jsonl", "sft", "train.sft"),
    Stage("compare", "responses.jsonl", "comparisons.jsonl"),
    Stage("label", "comparisons.jsonl", "labels.jsonl"),
    Stage("reward", "labels.jsonl", "reward", "train.reward"),
    Stage("ppo", "reward", "ppo"),
)
RUN = ("respond", "compare", "label")  # what `aif run` does


def stage(name: str) -> Stage:
    """The stage of that name."""
    return next(stage for stage in STAGES if stage.name == name)


def run_all(run: Run, progress: Progress) -> dict[str, Any]:
    """The stages of `aif run` in order; what an earlier try paid for is not asked again."""
    return {name: stage(name).function()(run, progress) for name in RUN}
