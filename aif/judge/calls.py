"""Judging comparisons: which calls are missing, and what the journal's answers come to.

What every stage that asks a judge shares; where its comparisons come from and which files it
leaves is the stage's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aif.config.settings import LabelSettings, LLMSettings
from aif.constitution import file as constitutions
from aif.errors import InputError
from aif.judge.aggregate import label_of
from aif.judge.judge import Cell, Judge
from aif.llm import Ask
from aif.run import Run
from aif.store.journal import Index, Reader
from aif.store.records import Comparison, Label, Verdict


def constitution_path(run: Run) -> Path:
    """The file that `label.constitution` names, or else `revise.constitution`; InputError if
    neither does."""
    path = run.settings.label.constitution or run.settings.revise.constitution
    if not path:
        raise InputError("label", "constitution", got="nothing", expected="--constitution FILE")
    return Path(path)


def judge_of(
    run: Run,
    constitution: Path,
    control_tokens: Iterable[str] = (),
    model: LLMSettings | None = None,
    label: LabelSettings | None = None,
) -> Judge:
    """The judge that a run's settings describe, with its constitution checked; `[judge]` asked as
    `[label]` says, unless others are given."""
    settings = run.settings
    judge = Judge(
        constitutions.load(constitution),
        model or settings.judge,
        label or settings.label,
        tuple(control_tokens),
    )
    judge.constitution.require(judge.protocol, constitution)
    return judge


@dataclass(frozen=True, slots=True)
class Work:
    """The calls that some comparisons need, and which of them are still to be made."""

    comparisons: int
    kept: int  # distinct calls that have an answer
    missing: dict[bytes, str]  # id -> principle id, of calls to be made
    failed_before: int  # of these, asked before without an answer
    unused: int  # answers in the journal that nothing needs now
    perhaps: int = 0  # calls besides, if what is missing leaves every comparison open

    def line(self) -> str:
        parts = [f"{self.comparisons:,} comparisons, {len(self.missing):,} calls to make"]
        parts += [f"{self.perhaps:,} more at most where they leave it open"] if self.perhaps else []
        parts += [f"{self.kept:,} answers kept"] if self.kept else []
        parts += [f"{self.failed_before:,} asked again after a fault"] if self.failed_before else []
        parts += [f"{self.unused:,} answers no longer used"] if self.unused else []
        return "; ".join(parts)


def count(
    cells: Callable[[Comparison], Iterable[Cell]], rows: Iterable[Comparison], index: Index
) -> Work:
    """Hold the cells of these comparisons against what the journal has."""
    kept: set[bytes] = set()
    missing: dict[bytes, str] = {}
    total = 0
    for comparison in rows:
        total += 1
        for cell in cells(comparison):
            key = bytes.fromhex(cell.id)
            if key in index.answered:
                kept.add(key)
            else:
                missing[key] = cell.principle.id
    failed = sum(key in index.failed for key in missing)
    return Work(total, len(kept), missing, failed, len(index.answered) - len(kept))


def asks_for(judge: Judge, rows: Iterable[Comparison], missing: Iterable[bytes]) -> Iterator[Ask]:
    """The missing calls, each once, made when they are wanted."""
    left = set(missing)
    for comparison in rows:
        for cell in judge.cells(comparison):
            key = bytes.fromhex(cell.id)
            if key in left:
                left.remove(key)
                yield judge.ask(cell, comparison)


def judged(
    judge: Judge, comparison: Comparison, journal: Reader, quorum: float
) -> tuple[list[tuple[Verdict, dict[str, Any]]], Label | None]:
    """The verdicts on a comparison with their journal rows, and the label they come to.

    The label is None while a call that the comparison needs was never made.
    """
    cells = judge.cells(comparison)
    found = list(verdicts_of(judge, cells, comparison, journal))
    if len(found) < len(cells):
        return found, None
    verdicts = [verdict for verdict, _ in found]
    return found, label_of(comparison, verdicts, judge.constitution, judge.protocol, quorum)


def verdicts_of(
    judge: Judge, cells: Iterable[Cell], comparison: Comparison, journal: Reader
) -> Iterator[tuple[Verdict, dict[str, Any]]]:
    """The verdicts that these cells have, each with its journal row."""
    for cell in cells:
        row = journal.newest(cell.id)
        if row is not None:
            yield judge.verdict(cell, comparison, row), row
