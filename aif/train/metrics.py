"""metrics.jsonl: the measurements of a stage while it trains, one row per number.

{"stage": "sft", "step": 10, "name": "eval_loss", "value": 2.31}
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from aif.run import Run
from aif.store import jsonl
from aif.store.records import as_row

FILE = "metrics.jsonl"
EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class Metric:
    """A row of metrics.jsonl."""

    stage: str
    step: int
    name: str
    value: float | None = None


class Metrics:
    """One stage's rows in metrics.jsonl; the rows of other stages stay.

    The file is replaced as a whole, so it is valid at every moment; at most every EVERY_S seconds.
    """

    def __init__(self, run: Run, stage: str):
        self._run, self._stage = run, stage
        path = run.file(FILE)
        rows = (row for _, row in jsonl.read(path)) if path.exists() else ()
        self._others = [row for row in rows if row.get("stage") != stage]
        self._due = 0.0

    def put(self, log: Iterable[dict[str, float]], now: bool = False) -> None:
        """Replace the stage's rows by `log`, whose entries are a step's numbers by name.

        Does nothing within EVERY_S seconds of the last time, unless `now`.
        """
        if not self._run.leads or (not now and time.monotonic() < self._due):
            return
        rows = (
            as_row(Metric(self._stage, entry["step"], name, value))
            for entry in log
            for name, value in entry.items()
            if name != "step"
        )
        jsonl.write(self._run.file(FILE), [*self._others, *rows])
        self._due = time.monotonic() + EVERY_S
