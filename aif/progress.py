"""Progress of a stage: a live bar on a terminal, or else a plain line every few seconds.

If work reports nothing for BEAT_S seconds (a model loads, a batch is sampled), a line says how long
it has taken.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

PLAIN_EVERY_S = 5.0
LIVE_EVERY_S = 0.1
BEAT_S = 9.0  # so that ten seconds never pass without a line


def duration(seconds: float) -> str:
    """A time for a person.

    >>> duration(42.3), duration(400), duration(90_000)
    ('42 s', '7 min', '25 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


class Progress:
    """Reports on stderr, since stdout is for results. `quiet` reports nothing.

    As a context manager it also reports work that reports nothing itself.
    """

    def __init__(self, quiet: bool = False):
        self._quiet = quiet
        self._live = not quiet and sys.stderr.isatty()
        self._bar = None
        self._task = None
        self._due = 0.0
        self._what, self._note, self._since, self._expected_s = "", "", time.monotonic(), None
        self._shown = self._since  # when a line was last shown
        self._lock = threading.RLock()  # of the main thread and of the one that beats
        self._ended = threading.Event()

    def stage(self, name: str, expected_s: float | None = None) -> None:
        """Begin a stage; `expected_s` is how many seconds it will probably take."""
        self.say(f"{name}, about {duration(expected_s)}" if expected_s else name)
        self._what, self._note, self._since = name, "", time.monotonic()
        self._expected_s = expected_s

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Begin a piece of work of `total` calls or steps; `done` are done by an earlier run."""
        self.finish()
        self._what, self._total, self._done, self._note = what, total, done, ""
        self._before = done
        self._began = time.monotonic()
        self._due = self._began + (0 if self._live else PLAIN_EVERY_S)
        if self._live and total:
            self._bar, self._task = _bar(what, total, done)

    @contextmanager
    def work(self, what: str, total: int, done: int = 0) -> Iterator[None]:
        """`start` at the beginning of the `with` and `finish` at its end."""
        self.start(what, total, done)
        try:
            yield
        finally:
            self.finish()

    def update(self, done: int, faults: int = 0, note: str = "") -> None:
        """Report that `done` calls are durable, `faults` of them with a fault. It is cheap.

        A `note` ("loss 1.2") is shown in place of the faults.
        """
        self._done, self._note = done, note or f"{faults:,} faults"
        now = time.monotonic()
        if self._quiet or now < self._due:
            return
        self._show(now)

    def note(self, line: str) -> None:
        """Report progress between two updates, as "token 3 of 64"."""
        self._note = line
        now = time.monotonic()
        if self._bar is not None and now >= self._due:
            self._show(now)

    def _show(self, now: float) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.update(self._task, completed=self._done, note=self._note)
                self._due, self._shown = now + LIVE_EVERY_S, now
                return
            rate = (self._done - self._before) / max(now - self._began, 1e-9)
            left = f"{(self._total - self._done) / rate:,.0f} s" if rate else "?"
            self.say(
                f"{self._what}: {self._done:,}/{self._total:,}, {rate:,.1f}/s, {left} left, "
                f"{self._note}"
            )
            self._due = now + PLAIN_EVERY_S

    def say(self, line: str) -> None:
        """A line for the person at the terminal."""
        if self._quiet:
            return
        with self._lock:
            self._shown = time.monotonic()
            if self._bar is not None:
                self._bar.console.print(line, markup=False, highlight=False)
            else:
                with suppress(OSError):  # whoever read stderr is gone; the work is not
                    print(line, file=sys.stderr, flush=True)

    def finish(self) -> None:
        """End the current piece of work and show its counts."""
        if self._bar is not None:
            self._show(time.monotonic())
            self._bar.stop()
            self._bar = None
        elif not self._quiet and self._due and self._total:
            self._show(time.monotonic())
        self._due = 0.0

    def _beat(self) -> None:
        """Until the end, report work that has been silent for BEAT_S seconds."""
        while not self._ended.wait(BEAT_S / 10):
            with self._lock:
                now = time.monotonic()
                if now - self._shown >= BEAT_S:
                    self._shown = now
                    self.say(self._so_far(now - self._since))

    def _so_far(self, seconds: float) -> str:
        """How long the current work has taken."""
        count = f": {self._done:,}/{self._total:,}" if self._due else ""
        whole = f" of about {duration(self._expected_s)}" if self._expected_s else ""
        note = f", {self._note}" if self._note else ""
        return f"{self._what or 'working'}{count}{note}, {duration(seconds)}{whole}"

    def __enter__(self) -> Self:
        if not self._quiet:
            threading.Thread(target=self._beat, daemon=True, name="progress").start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._ended.set()
        self.finish()


def _bar(what: str, total: int, done: int):
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task) -> Text:
            return Text(f"{task.finished_speed or task.speed or 0:,.1f}/s")

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        expand=True,
    )
    task = bar.add_task(what, total=total, completed=done, note="")
    bar.start()
    return bar, task
