"""What the calls of a run have cost, and a budget that they never exceed.

Before a call is handed out, the most that it can cost is reserved: the tokens of its prompt (or one
per byte, if they cannot be counted exactly) and all the tokens that its answer may have. When the
answer comes, its real cost takes the place of the reservation and is written to its journal row:

    {"id":"9f0c...","fault":null, ..., "usage":{"prompt_tokens":212,"completion_tokens":1},
     "cost":3.24e-05,"crc":"..."}

`cost` is null for an API without a price; the rows of a local model have no `cost`.

Under a budget the reservations are on the disk before the calls are made
(journal/STAGE.reserved.jsonl, a journal of blocks of calls). So the calls in flight of a process
that is killed count as spent, at the most that they can have cost.

    {"calls":{"9f0c...":0.00021, ...},"at":40960,"lasting":false}   may be made now
    {"returned":["9f0c...", ...]}                                   were not made
    {"lost":0.00084}          reserved, but in no row of the journal when the next process began

`at` is the end of the journal at that moment; `lasting` are calls of a `ResumableLLM`.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aif.config.price import EXPECTED, Price, dollars
from aif.config.settings import LLMSettings, Settings
from aif.errors import InputError
from aif.llm import LLM, Answer, Ask
from aif.llm.submissions import ResumableLLM
from aif.llm.usage import USAGE
from aif.run import Run
from aif.store.journal import Journal, scan
from aif.store.records import content_id

LABELS = "label"  # the stage that label.budget is for
RESERVED = ".reserved.jsonl"
# Tokens that a server adds to each message, and to all together: roles, markers, a system prompt.
AROUND_MESSAGE, AROUND_ALL = 16, 64
BATCH = 1024  # calls reserved at once for a model that takes them in batches
TOLERANCE = 1e-12  # dollars: sums of floats


def price_of(model: LLMSettings) -> Price | None:
    """The price in a model's settings."""
    return None if model.price is None else Price.of(model.price)


def model_of(settings: Settings, stage: str) -> LLMSettings:
    """The model that a stage asks."""
    sampled = {"respond": settings.policy, "resample": settings.policy}
    return (sampled | {"revise": settings.reviser_model}).get(stage, settings.judge)


def journals(run: Path) -> list[Path]:
    """Every journal of answers at or below a run, with those of its iterations and evaluations."""
    return sorted(path for path in run.rglob("journal/*.jsonl") if "." not in path.stem)


def spent_in(path: Path, settings: Settings) -> float:
    """Dollars that the answers in a journal have cost."""
    return Spending.read(path, price_of(model_of(settings, path.stem))).spent


def cost_of(run: Run, stage: str) -> float | None:
    """Dollars that a stage of a run has spent so far; None without a price. Each policy of an
    evaluation, and its matches, are runs of their own."""
    every = [run.file("journal") / f"{stage}.jsonl"]
    if stage == "evaluate":
        every = journals(run.file("evaluation"))
    spent = sum(spent_in(path, run.settings) for path in every)
    return spent if spent or model_of(run.settings, stage).price else None


class Reservation(NamedTuple):
    """The most that one request can cost."""

    dollars: float
    at: int  # the end of the journal when it was reserved
    resumable: bool


@dataclass
class Spending:
    """What the answers in a journal have cost, in dollars."""

    paid: float = 0.0
    lost: float = 0.0  # for calls of processes that ended before they kept the answers
    missing: float = 0.0  # for calls of the last process that have no answer (yet)
    reserved: dict[str, float] = field(default_factory=dict)  # key -> for calls at a Batch API

    @property
    def spent(self) -> float:
        """All of it, at most."""
        return self.paid + self.lost + self.missing + sum(self.reserved.values())

    @classmethod
    def read(cls, path: Path, price: Price | None) -> Spending:
        """From the journal at `path`; `price` is for answers without a cost of their own."""
        spending = cls()
        by_key: dict[str, list[Reservation]] = defaultdict(list)
        for _, row in _rows(path.with_suffix(RESERVED)):
            spending._note(row, by_key)
        for offset, row in _rows(path):
            if row["id"] in by_key:  # an answer settles the reservations before it
                by_key[row["id"]] = [one for one in by_key[row["id"]] if one.at > offset]
            if "cost" in row:
                cost = row["cost"]
                spending.paid += cost if cost is not None else _cost(row["usage"], price)
        for key, reservations in by_key.items():
            spending.missing += sum(one.dollars for one in reservations if not one.resumable)
            if reserved := sum(one.dollars for one in reservations if one.resumable):
                spending.reserved[key] = reserved
        return spending

    def _note(self, row: dict[str, Any], by_key: dict[str, list[Reservation]]) -> None:
        """Take in a row of the reservations."""
        for key, cost in row.get("calls", {}).items():
            by_key[key].append(Reservation(cost, row["at"], row["lasting"]))
        for key in row.get("returned", ()):
            by_key[key].pop()
        if "lost" in row:
            self.lost += row["lost"]
            for key, reservations in by_key.items():
                by_key[key] = [one for one in reservations if one.resumable]


def _cost(usage: dict[str, int], price: Price | None) -> float:
    return price.cost(*(usage.get(name, 0) for name in USAGE)) if price else 0.0


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset, row) of every good line of a journal; none if there is no such file."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for offset, size, entry in scan(path):
            if not isinstance(entry, str):
                file.seek(offset)
                yield offset, json.loads(file.read(size))


@dataclass(frozen=True, slots=True)
class Limit:
    """A budget in dollars, and how much of it other stages have spent."""

    setting: str
    dollars: float
    elsewhere: float


class Meter:
    """What the calls of a stage cost, for `dispatch.ask_all`, which opens and uses it."""

    def __init__(self, model: LLMSettings):
        self.model = model
        self.price = price_of(model)
        self._limits: list[Limit] = []
        self._is_api = model.model.startswith(("openai:", "openai-batch:"))
        self.cost = None if self.price is None else 0.0  # dollars for the answers so far

    @classmethod
    def of(cls, run: Run, stage: str, model: LLMSettings) -> Meter:
        """A meter with the budgets in the run's settings, for a stage that asks `model`.

        Raises InputError if there is a budget and no price. A local model beside judges with a
        price is free.
        """
        meter = cls(model)
        judges = (run.settings.judge, *run.settings.panel)
        if not meter.costs and any(judge.price for judge in judges):
            return meter
        budgets = {"pipeline.budget": run.settings.pipeline.budget if meter.costs else None}
        if stage == LABELS:
            budgets["label.budget"] = run.settings.label.budget
        own = run.path / "journal" / f"{stage}.jsonl"
        for setting, budget in budgets.items():
            if budget is None:
                continue
            if meter.price is None:
                expected = f"--price, or price in its table: {EXPECTED} (there is a {setting})"
                raise InputError(model.model, "price", got="nothing", expected=expected)
            others = [path for path in journals(run.root) if path != own]
            if setting == "label.budget":
                others = [path for path in others if path.stem == LABELS]
            spent = sum(spent_in(path, run.settings) for path in others)
            meter._limits.append(Limit(setting, budget, spent))
        return meter

    @property
    def costs(self) -> bool:
        """Whether calls cost money: the model has a price, or is an API without one."""
        return self._is_api or self.price is not None

    @contextmanager
    def opened(self, llm: LLM, journal: Journal) -> Iterator[Meter]:
        """For a `with`: counts the calls of `llm` and the answers in `journal`."""
        self._llm, self._journal = llm, journal
        self._resumable = isinstance(llm, ResumableLLM)
        self._block = BATCH if self._resumable else self.model.concurrency
        path = journal.path.with_suffix(RESERVED)
        # key -> dollars: the most for one request, and reserved for all of this ask
        self._in_flight: dict[str, tuple[float, float]] = {}
        self._left: deque[Ask] = deque()  # that did not fit
        self._short = False
        counted = bool(self._limits) or path.exists()
        spending = Spending.read(self._journal.path, self.price) if counted else Spending()
        self._at_server = spending.reserved if self._resumable else {}
        self._submitted = set(self._at_server)
        self._reserved = sum(spending.reserved.values())  # dollars, now
        self._spent = spending.paid + spending.lost + spending.missing
        with Journal.open(path) if counted else nullcontext() as self._reservations:
            if spending.missing:
                self._write({"lost": spending.missing})
            yield self

    def granted(self, asks: Iterator[Ask]) -> Iterator[Ask]:
        """The asks that fit, in order, up to the first that does not; call it again when all of
        them have an answer. Under a budget each is reserved durably, in blocks."""
        if not self._limits:
            for ask in asks:
                if self.price is not None:
                    self._in_flight[ask.key] = (self._most(ask), 0.0)
                yield ask
            return
        self._short = False
        refused: deque[Ask] = deque()
        block: deque[Ask] = deque()
        try:
            while block or self._fill(block, refused, asks):
                ask = block.popleft()
                yield replace(ask, may_retry=partial(self._reserve_again, ask.key))
        finally:
            self._return(block)
            self._left.extendleft(reversed(block + refused))

    def _fill(self, block: deque[Ask], refused: deque[Ask], asks: Iterator[Ask]) -> int:
        """Reserve the next asks and put them in `block`; returns how many there are.

        After the first that does not fit only those are taken that a server already has: their
        money is reserved, and their answers are wanted.
        """
        calls: dict[str, float] = {}
        while len(block) < self._block and not (refused and not self._at_server):
            ask = self._left.popleft() if self._left else next(asks, None)
            if ask is None:
                break
            most = self._most(ask)
            if ask.key in self._at_server:
                self._in_flight[ask.key] = (most, self._at_server.pop(ask.key))
            elif refused or not self._fits(most):
                refused.append(ask)
                continue
            else:
                self._in_flight[ask.key] = (most, most)
                self._reserved += most
                calls[ask.key] = most
            block.append(ask)
        if calls:
            self._write({"calls": calls} | self._place)
        return len(block)

    @property
    def _place(self) -> dict[str, Any]:
        return {"at": self._journal.index.end, "lasting": self._resumable}

    def _return(self, block: Iterable[Ask]) -> None:
        """Give back the reservations of asks that were never handed out."""
        returned = []
        for ask in block:
            _, reserved = self._in_flight.pop(ask.key)
            if ask.key in self._submitted:
                self._at_server[ask.key] = reserved
            else:
                self._reserved -= reserved
                returned.append(ask.key)
        if returned:
            self._write({"returned": returned})

    def _reserve_again(self, key: str) -> bool:
        """Reserve a retry of a request that may have been paid for; False if it does not fit."""
        most, total = self._in_flight[key]
        if not self._fits(most):
            self._short = True
            return False
        self._in_flight[key] = (most, total + most)
        self._reserved += most
        self._write({"calls": {key: most}} | self._place)
        return True

    def settled(self, answer: Answer, row: dict[str, Any]) -> dict[str, Any]:
        """The journal row of an answer, with its cost."""
        most, reserved = self._in_flight.pop(answer.key, (0.0, 0.0))
        self._reserved -= reserved
        if self.price is None:
            return row | {"cost": None} if self._is_api else row
        cost = _cost(answer.usage, self.price) + answer.unmetered * most
        self._spent += cost
        self.cost += cost
        return row | {"cost": cost}

    def goes_on(self) -> bool:
        """Whether the next ask fits after all, now that all before it have an answer."""
        return bool(self._left) and self._fits(self._most(self._left[0]))

    @property
    def is_spent(self) -> bool:
        """Whether an ask was left out, or not retried, because it did not fit."""
        return bool(self._left) or self._short

    def line(self) -> str:
        """One line about the budget with the least left."""
        limit = min(self._limits, key=self._left_of)
        spent = limit.dollars - self._left_of(limit)
        return (
            f"the budget is spent: {dollars(spent)} of {dollars(limit.dollars)} "
            f"({limit.setting}), and the next call may cost more than is left"
        )

    def _left_of(self, limit: Limit) -> float:
        return limit.dollars - limit.elsewhere - self._spent - self._reserved

    def _fits(self, cost: float) -> bool:
        return all(cost <= self._left_of(limit) + TOLERANCE for limit in self._limits)

    def _most(self, ask: Ask) -> float:
        """The most that one request can cost."""
        tokens, exact = self._llm.count_tokens([ask])
        if not exact:
            tokens = most_tokens(ask)
        return self.price.cost(tokens, ask.max_tokens * ask.samples)

    def _write(self, row: dict[str, Any]) -> None:
        """Make a row of the reservations durable."""
        key = content_id(self._reservations.index.end, row)
        self._reservations.append({"id": key, "fault": None} | row)
        self._reservations.commit()


def most_tokens(ask: Ask) -> int:
    """An upper bound on the prompt tokens: tokenizers of today's models fall back to bytes, so no
    text has more tokens than bytes of UTF-8."""
    size = sum(len(text.encode("utf-8", "replace")) for text in ask.texts)
    return size + AROUND_MESSAGE * len(ask.texts) + AROUND_ALL
