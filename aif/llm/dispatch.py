"""Paying for answers: asks go to a model, answers into the journal, until all is durable.

The one loop under every stage that calls a model. It ends early, with everything so far kept, when
a signal asks for it, when the model is gone, or when the budget is spent.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from aif.config.settings import LLMSettings
from aif.errors import AifError, BudgetSpent, Interrupted, JudgeStopped, TooManyFaults
from aif.llm import LLM, Answer, Ask, Caller, Lasting
from aif.llm.budget import Meter
from aif.progress import Progress
from aif.signals import handling
from aif.store.journal import Journal
from aif.store.records import FAULTS, SERVICE_FAULTS

GONE_AFTER = 100  # service faults in an unbroken row: nobody is there
DRAIN_S = 10.0  # after the first signal, calls in flight may take this long


@dataclass
class Tally:
    """What came of it. `stopped` is why it ended early, for the caller to raise when it is done."""

    answered: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    stopped: AifError | None = None

    @property
    def calls(self) -> int:
        """Calls made, with or without an answer."""
        return self.answered + self.faults.total()

    @property
    def calls_per_s(self) -> float | None:
        """How fast calls were answered; None where there were none."""
        return round(self.calls / self.seconds, 3) if self.calls and self.seconds else None

    def add(self, more: Tally) -> None:
        """Take another tally into this one."""
        self.answered += more.answered
        self.faults.update(more.faults)
        self.seconds += more.seconds
        self.stopped = self.stopped or more.stopped


@dataclass
class Faults:
    """Calls that came to nothing, by kind, with one example of each."""

    calls: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    details: dict[str, str] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        """Count a journal row, and its fault if it has one."""
        self.calls += 1
        if row["fault"]:
            self.kinds[row["fault"]] += 1
            self.details.setdefault(row["fault"], row["detail"])

    def include(self, summary: dict[str, Any]) -> None:
        """Count the calls of a labelling, by its summary."""
        self.calls += summary["verdicts"]
        self.kinds.update(summary["faults"])
        self.details |= summary["fault_details"]

    def summary(self) -> dict[str, Any]:
        """What `check_faults` reads."""
        return {
            "faults": dict(self.kinds),
            "fault_details": self.details,
            "fault_rate": self.kinds.total() / max(1, self.calls),
        }


def ask_all(
    llm: LLM,
    asks: Iterable[Ask],
    journal: Journal,
    row_of: Callable[[Answer], dict[str, Any]],
    progress: Progress,
    meter: Meter | None = None,
) -> Tally:
    """Ask everything that `meter` has money for, journal every answer (as `row_of` makes it a
    row, with what it cost), return the tally.

    Raises AifError at once when the journal cannot be written.
    """
    tally = Tally()
    before, began = journal.durable, time.monotonic()
    meter = (meter or Meter(LLMSettings())).opened(llm, journal)
    try:
        with draining(progress) as stop, meter:
            if isinstance(llm, Lasting):
                ledger = journal.path.with_suffix(".batches.jsonl")
                llm.attend(Caller(ledger, journal.commit, stop.is_set, progress.say))
            left = iter(asks)
            while True:
                with closing(meter.granted(left)) as granted:
                    handed = _until(stop, granted)
                    _pay(llm, handed, journal, row_of, progress, tally, before, meter)
                if stop.is_set() or not meter.goes_on():
                    break
            if stop.is_set():
                tally.stopped = Interrupted("interrupted; the same command resumes")
            elif meter.is_spent:
                tally.stopped = BudgetSpent(meter.line())
    except (JudgeStopped, Interrupted) as error:
        tally.stopped = error
    journal.commit()
    progress.update(journal.durable - before, tally.faults.total())
    tally.seconds = time.monotonic() - began
    return tally


def _pay(
    llm: LLM,
    asks: Iterator[Ask],
    journal: Journal,
    row_of: Callable[[Answer], dict[str, Any]],
    progress: Progress,
    tally: Tally,
    before: int,
    meter: Meter,
) -> None:
    failing = 0
    with closing(llm.answer(asks)) as answers:
        for answer in answers:
            row = meter.settled(answer, row_of(answer))
            journal.append(row)
            fault = row["fault"]
            if fault is None:
                tally.answered += 1
            else:
                tally.faults[fault] += 1
            progress.update(journal.durable - before, tally.faults.total())
            failing = failing + 1 if fault in SERVICE_FAULTS else 0
            if failing >= GONE_AFTER:
                raise JudgeStopped(
                    f"the last {failing} calls failed ({FAULTS[fault]}: {answer.detail}); "
                    "stopped before the rest fail too, the same command resumes"
                )


def check_faults(summary: dict[str, Any], allowed: float) -> None:
    """Raise TooManyFaults if more than this share of a stage's calls have no answer."""
    if summary["fault_rate"] > allowed:
        details = summary["fault_details"]
        kinds = ", ".join(
            f"{n:,} {kind}" + (f": {details[kind]}" if details[kind] else "")
            for kind, n in summary["faults"].items()
        )
        raise TooManyFaults(
            f"{summary['run']}: {summary['fault_rate']:.1%} of the calls have no answer ({kinds}), "
            f"--max-fault-rate is {allowed:.1%}; the same command asks those again"
        )


def _until(stop: threading.Event, asks: Iterable[Ask]) -> Iterator[Ask]:
    for ask in asks:
        if stop.is_set():
            return
        yield ask


@contextmanager
def draining(progress: Progress) -> Iterator[threading.Event]:
    """Make SIGINT and SIGTERM set the event: ask no more, let what is in flight come in.

    A drain that takes too long is ended by raising Interrupted; a second signal leaves at once
    (the journal is valid at every moment). Outside the main thread signals are left alone.
    """
    stop = threading.Event()

    def first(number: int, frame: object) -> None:
        if stop.is_set():
            os._exit(Interrupted.exit_code)
        stop.set()
        signal.setitimer(signal.ITIMER_REAL, DRAIN_S)
        # Ctrl-C also ends the `tee` that reads our stderr, and may come in the middle of a print.
        with suppress(OSError, RuntimeError):
            progress.say(
                f"stopping: up to {DRAIN_S:g} s for calls in flight; again to leave at once"
            )

    def late(number: int, frame: object) -> None:
        raise Interrupted(
            "interrupted, some calls in flight were given up; the same command resumes"
        )

    handlers = {signal.SIGINT: first, signal.SIGTERM: first, signal.SIGALRM: late}
    with handling(handlers, alarm_s=0):
        yield stop
