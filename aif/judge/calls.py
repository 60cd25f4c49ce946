"""Which calls of a panel are missing, and how they are asked: the part that every labelling shares.

comparisons -> Panel.needed -> PendingCalls -> schedule -> Judge.asks -> journal
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import ceil

from aif.config.settings import LLMSettings
from aif.errors import JudgeStopped
from aif.judge.judge import Judge
from aif.judge.panel import Panel
from aif.llm import open_llm
from aif.llm.budget import Meter
from aif.llm.dispatch import CallTally, ask_all
from aif.progress import Progress
from aif.run import Run
from aif.store.journal import Journal, Reader
from aif.store.records import Comparison

Rows = Callable[[], Iterable[Comparison]]  # the comparisons, from the first one at each call
SLICE, SLICES = 64, 20  # comparisons in a slice at least, and slices at most


@dataclass(slots=True)
class PendingCalls:
    """The calls that comparisons need, by what a journal has of them. Each counts once."""

    missing: dict[str, dict[bytes, str]]  # judge -> call -> principle, of calls to make
    conditional: dict[str, set[bytes]]  # judge -> calls to make if all first passes leave it open
    comparisons: int = 0
    kept: int = 0  # calls that have an answer
    failed_before: int = 0  # missing calls that were made before, without an answer
    unused: int = 0  # answers in the journal that no comparison needs now

    @classmethod
    def of(cls, panel: Panel, rows: Iterable[Comparison], journal: Reader) -> PendingCalls:
        """The calls of these comparisons."""
        names = [judge.name for judge in panel.judges]
        pending = cls({name: {} for name in names}, {name: set() for name in names})
        answered, failed = journal.index.answered, journal.index.failed
        kept: set[bytes] = set()
        for comparison in rows:
            pending.comparisons += 1
            needed, conditional = panel.needed(comparison, journal)
            for judge, calls in needed:
                for call in calls:
                    if (digest := call.digest) in answered:
                        kept.add(digest)
                    else:
                        pending.missing[judge.name][digest] = call.principle.id
            for judge, calls in conditional:
                pending.conditional[judge.name].update(call.digest for call in calls)
        for name, missing in pending.missing.items():
            pending.conditional[name] -= missing.keys() | answered.keys()
            pending.failed_before += sum(digest in failed for digest in missing)
        pending.kept, pending.unused = len(kept), len(answered) - len(kept)
        return pending

    @property
    def calls(self) -> int:
        """How many calls are to be made."""
        return sum(map(len, self.missing.values()))

    @property
    def conditional_calls(self) -> int:
        """How many more there are if every first pass leaves its comparison open."""
        return sum(map(len, self.conditional.values()))

    def line(self) -> str:
        """The counts for a person."""
        parts = [f"{self.comparisons:,} comparisons, {self.calls:,} calls to make"]
        if more := self.conditional_calls:
            parts.append(f"{more:,} more at most where they leave it open")
        parts += [f"{self.kept:,} answers kept"] if self.kept else []
        parts += [f"{self.failed_before:,} asked again after a fault"] if self.failed_before else []
        parts += [f"{self.unused:,} answers no longer used"] if self.unused else []
        return "; ".join(parts)


def check_models(run: Run, stage: str, models: Iterable[LLMSettings]) -> None:
    """Raise InputError for a model that cannot be opened or that a budget has no price for."""
    for model in models:
        Meter.of(run, stage, model)
        with open_llm(model) as llm:
            _ = llm.control_tokens  # reads the tokenizer of a model in this process


def ask_missing(
    run: Run,
    stage: str,
    panel: Panel,
    pending: PendingCalls,
    rows: Rows,
    journal: Journal,
    progress: Progress,
) -> tuple[CallTally, float | None]:
    """Make the pending calls, one judge after the other; returns the tally and the cost in dollars.

    Under a budget several judges go through the comparisons in slices, so that the calls paid for
    make whole labels when the budget is spent.
    """
    tally, costs = CallTally(), []
    total = pending.comparisons
    has_budget = run.settings.label.budget or run.settings.pipeline.budget
    in_slices = has_budget and (panel.several or panel.escalates)
    size = max(SLICE, ceil(total / SLICES)) if in_slices else max(1, total)
    for start in range(0, total, size):
        part = partial(_slice, rows, start, start + size)
        due = pending if size >= total else PendingCalls.of(panel, part(), journal)
        for judge, missing in schedule(panel, due, part, journal):
            meter = Meter.of(run, stage, judge.model)
            name = f"{stage}, {judge.name}" if panel.several else stage
            # The model is in memory for these calls and no longer; loading it counts as work.
            with progress.work(name, len(missing)), open_llm(judge.model) as llm:
                asks = judge.asks(part(), missing, llm.control_tokens)
                tally.add(ask_all(llm, asks, journal, judge.journal_row, progress, meter))
            costs += [] if meter.cost is None else [meter.cost]
            if tally.stopped:
                if panel.several and isinstance(tally.stopped, JudgeStopped):
                    tally.stopped = JudgeStopped(f"{judge.name}: {tally.stopped}")
                return tally, sum(costs) if costs else None
    return tally, sum(costs) if costs else None


def _slice(rows: Rows, start: int, stop: int) -> Iterator[Comparison]:
    return islice(rows(), start, stop)


def schedule(
    panel: Panel, pending: PendingCalls, rows: Rows, journal: Reader
) -> Iterator[tuple[Judge, set[bytes]]]:
    """(judge, its missing calls) in turn, until no answer makes more calls necessary. No call comes
    twice, even if it fails."""
    scheduled: set[bytes] = set()
    while True:
        before = len(scheduled)
        for judge in panel.judges:
            if fresh := pending.missing[judge.name].keys() - scheduled:
                scheduled |= fresh
                yield judge, fresh
        if len(scheduled) == before or not panel.escalates:
            return
        pending = PendingCalls.of(panel, rows(), journal)
