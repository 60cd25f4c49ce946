"""The loop of every stage that calls a model: asks go to the model, answers go to the journal.

It ends early on a signal, when the model is gone, or when the budget is spent. All answers so far
are kept.
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
from itertools import takewhile
from typing import Any

from aif.config.settings import LLMSettings
from aif.errors import AifError, BudgetSpent, Interrupted, JudgeStopped, TooManyFaults
from aif.llm import LLM, Answer, Ask
from aif.llm.budget import Meter
from aif.llm.submissions import ResumableLLM, Session
from aif.progress import Progress
from aif.signals import handling
from aif.store.journal import Journal
from aif.store.records import FAULTS, SERVICE_FAULTS

GONE_AFTER = 100  # service faults in an unbroken row: nobody is there
DRAIN_S = 10.0  # after the first signal, calls in flight may take this long


@dataclass
class CallTally:
    """Calls with and without an answer. `stopped` is why it ended early, for the stage to raise."""

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
        """Calls per second; None if there were none."""
        return round(self.calls / self.seconds, 3) if self.calls and self.seconds else None

    def add(self, more: CallTally) -> None:
        """Add the counts of another tally."""
        self.answered += more.answered
        self.faults.update(more.faults)
        self.seconds += more.seconds
        self.stopped = self.stopped or more.stopped


@dataclass
class Faults:
    """Calls without an answer, by kind of fault, with one example of each."""

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
        """The keys of a stage's summary that `check_faults` reads."""
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
) -> CallTally:
    """Ask everything that `meter` has money for, and append every answer to the journal, as the
    row that `row_of` makes of it and its cost.

    Raises AifError at once if the journal cannot be written.
    """
    tally = CallTally()
    before, began, failing = journal.durable, time.monotonic(), 0
    meter = meter or Meter(LLMSettings())

    def keep(answer: Answer) -> None:
        nonlocal failing
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

    try:
        with draining(progress) as stop, meter.opened(llm, journal):
            llm.note = progress.note
            if isinstance(llm, ResumableLLM):
                log = journal.path.with_suffix(".batches.jsonl")
                llm.resume_with(Session(log, journal.commit, stop.is_set, progress.say))
            left = iter(asks)
            while True:
                with closing(meter.granted(left)) as granted:
                    until_stop = takewhile(lambda _: not stop.is_set(), granted)
                    with closing(llm.answer(until_stop)) as answers:
                        for answer in answers:
                            keep(answer)
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


@contextmanager
def draining(progress: Progress) -> Iterator[threading.Event]:
    """Make SIGINT and SIGTERM set the event: ask no more, wait for the calls in flight.

    If that takes too long, Interrupted is raised; a second signal leaves at once (the journal is
    valid at every moment).
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
