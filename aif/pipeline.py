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
    """A verb of a run: `aif.NAME.NAME(run, progress)` makes `writes` from `reads`."""

    name: str
    reads: str
    writes: str

    def function(self) -> Callable[[Run, Progress], dict[str, Any]]:
        """The stage's function; its module is imported only now."""
        return getattr(import_module(f"aif.{self.name}"), self.name)


STAGES = (
    Stage("respond", "respond.prompts", "responses.jsonl"),
    Stage("compare", "responses.jsonl", "comparisons.jsonl"),
    Stage("label", "comparisons.jsonl", "labels.jsonl"),
)


def run_all(run: Run, progress: Progress) -> dict[str, Any]:
    """Every stage in order; what an earlier try already paid for is not asked again."""
    return {stage.name: stage.function()(run, progress) for stage in STAGES}
