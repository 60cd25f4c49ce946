"""What a run's calls have cost, and a budget that they never exceed.

Before a call is handed out the most that it can cost is reserved: a token for every byte of its
prompt, or its tokens where they can be counted exactly, and all the tokens that its answer may
have. When the answer comes the reservation becomes what it did cost, which stands in its journal
row:

    {"id":"9f0c...","fault":null, ..., "usage":{"prompt_tokens":212,"completion_tokens":1},
     "cost":3.24e-05,"crc":"..."}

`cost` is null where an API was asked and nobody told its price; a local model's rows have none.

Under a budget the reservations are on the disk before the calls are made
(journal/STAGE.reserved.jsonl, a journal of blocks of calls), so that a process that is killed has
spent them: its calls in flight count as the most that they can have cost.

    {"calls":{"9f0c...":0.00021, ...},"at":40960,"lasting":false}   may be asked now
    {"returned":["9f0c...", ...]}                                   were not
    {"lost":0.00084}          what no row in the journal accounts for, when the next process began
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from aif.config.price import EXPECTED, Price, dollars
from aif.config.settings import LLMSettings, Settings
from aif.errors import InputError
from aif.llm import LLM, Answer, Ask, Lasting
from aif.run import Run
from aif.store.journal import Journal, scan
from aif.store.records import content_id

LABELS = "label"  # the stage that label.budget is for
USAGE = ("prompt_tokens", "completion_tokens")
RESERVED = ".reserved.jsonl"
# What a server puts around a message, and around them all: roles, markers, a system prompt.
AROUND_MESSAGE, AROUND_ALL = 16, 64
BATCH = 1024  # calls reserved at once where they are handed in together
TOLERANCE = 1e-12  # dollars: sums of floats
Entry = tuple[float, int, bool]  # dollars, the journal's end when it was reserved, is it lasting


def price_of(model: LLMSettings) -> Price | None:
    """What a model's settings say of its price."""
    return None if model.price is None else Price.of(model.price)


def asked(settings: Settings, stage: str) -> LLMSettings:
    """The model that a stage asks."""
    sampled = {"respond": settings.policy, "resample": settings.policy}
    return (sampled | {"revise": settings.reviser or settings.policy}).get(stage, settings.judge)


def journals(run: Path) -> list[Path]:
    """Every journal of answers at or below a run, with those of its iterations and evaluations."""
    return sorted(path for path in run.rglob("journal/*.jsonl") if "." not in path.stem)


def spent_in(path: Path, settings: Settings) -> float:
    """Dollars that the answers in a journal have cost."""
    return Books.read(path, price_of(asked(settings, path.stem))).spent


def cost_of(run: Run, stage: str) -> float | None:
    """Dollars that a stage of a run has spent, for whoever looks in; None where nothing is known
    of a price. Each policy of an evaluation, and its matches, are runs of their own."""
    every = [run.file("journal") / f"{stage}.jsonl"]
    if stage == "evaluate":
        every = journals(run.file("evaluation"))
    spent = sum(spent_in(path, run.settings) for path in every)
    return spent if spent or asked(run.settings, stage).price else None


@dataclass
class Books:
    """What the answers in a journal have cost, in dollars."""

    paid: float = 0.0
    lost: float = 0.0  # of calls whose answers an earlier process did not live to keep
    missing: float = 0.0  # of calls that the last one asked, and has not kept (yet)
    held: dict[str, float] = field(default_factory=dict)  # key -> of calls that a server still has

    @property
    def spent(self) -> float:
        """All of it, at most."""
        return self.paid + self.lost + self.missing + sum(self.held.values())

    @classmethod
    def read(cls, path: Path, price: Price | None) -> Books:
        """Of the journal at `path`; `price` is for answers that nobody told the price of."""
        books = cls()
        entries: dict[str, list[Entry]] = defaultdict(list)
        for _, row in _rows(path.with_suffix(RESERVED)):
            books._note(row, entries)
        for offset, row in _rows(path):
            if row["id"] in entries:  # it accounts for what was reserved before it
                left = [entry for entry in entries[row["id"]] if entry[1] > offset]
                entries[row["id"]] = left
            if "cost" in row:
                books.paid += row["cost"] if row["cost"] is not None else _cost(row["usage"], price)
        for key, left in entries.items():
            books.missing += sum(cost for cost, _, lasting in left if not lasting)
            if held := sum(cost for cost, _, lasting in left if lasting):
                books.held[key] = held
        return books

    def _note(self, row: dict[str, Any], entries: dict[str, list[Entry]]) -> None:
        """Take in a row of the reservations."""
        for key, cost in row.get("calls", {}).items():
            entries[key].append((cost, row["at"], row["lasting"]))
        for key in row.get("returned", ()):
            entries[key].pop()
        if "lost" in row:
            self.lost += row["lost"]
            for key, found in entries.items():
                entries[key] = [entry for entry in found if entry[2]]


def _cost(usage: dict[str, int], price: Price | None) -> float:
    return price.cost(*(usage.get(name, 0) for name in USAGE)) if price else 0.0


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset, row) of every good line of a journal, none where there is no such file."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for offset, size, found in scan(path):
            if not isinstance(found, str):
                file.seek(offset)
                yield offset, json.loads(file.read(size))


@dataclass(frozen=True, slots=True)
class Limit:
    """A budget in dollars, and what of it others than this stage have spent."""

    setting: str
    dollars: float
    elsewhere: float


class Meter(AbstractContextManager["Meter"]):
    """What the calls of a stage cost, for `asking.ask_all`, which opens and uses it."""

    def __init__(self, model: LLMSettings):
        self.model = model
        self.price = price_of(model)
        self._limits: list[Limit] = []
        self._is_api = model.model.startswith(("openai:", "openai-batch:"))
        self.total = 0.0  # dollars for what was settled since it was made

    @classmethod
    def of(cls, run: Run, stage: str, model: LLMSettings) -> Meter:
        """Under the budgets that the run's settings set for a stage that asks `model`.

        Raises InputError where there is a budget and no price to count it by. A local model beside
        judges that have one is free.
        """
        found = cls(model)
        judges = (run.settings.judge, *run.settings.panel)
        if not found.costs and any(judge.price for judge in judges):
            return found
        budgets = {"pipeline.budget": run.settings.pipeline.budget if found.costs else None}
        if stage == LABELS:
            budgets["label.budget"] = run.settings.label.budget
        own = run.path / "journal" / f"{stage}.jsonl"
        for setting, budget in budgets.items():
            if budget is None:
                continue
            if found.price is None:
                expected = f"--price, or price in its table: {EXPECTED} (there is a {setting})"
                raise InputError(model.model, "price", got="nothing", expected=expected)
            others = [path for path in journals(run.root) if path != own]
            if setting == "label.budget":
                others = [path for path in others if path.stem == LABELS]
            spent = sum(spent_in(path, run.settings) for path in others)
            found._limits.append(Limit(setting, budget, spent))
        return found

    @property
    def costs(self) -> bool:
        """Whether there is something to pay: a price was told, or is not known."""
        return self._is_api or self.price is not None

    def opened(self, llm: LLM, journal: Journal) -> Meter:
        """Ready for a `with`, to count what `llm` is asked and what goes into `journal`."""
        self._llm, self._journal = llm, journal
        self._lasting = isinstance(llm, Lasting)
        self._block = BATCH if self._lasting else self.model.concurrency
        self._path = journal.path.with_suffix(RESERVED)
        self._reserved: Journal | None = None
        self._in_flight: dict[str, tuple[float, float]] = {}  # key -> of one request, of all
        self._left: deque[Ask] = deque()  # that did not fit
        self._short = False
        return self

    def __enter__(self) -> Meter:
        counted = bool(self._limits) or self._path.exists()
        books = Books.read(self._journal.path, self.price) if counted else Books()
        self._waiting = books.held if self._lasting else {}
        self._had = set(self._waiting)
        self._held = sum(books.held.values())  # dollars reserved now
        self._spent = books.paid + books.lost + books.missing
        if counted:
            self._reserved = Journal.open(self._path)
        if books.missing:
            self._write({"lost": books.missing})
        return self

    def __exit__(self, *error: Any) -> None:
        if self._reserved is not None:
            self._reserved.__exit__(*error)

    def granted(self, asks: Iterator[Ask]) -> Iterator[Ask]:
        """The asks that fit, in their order, up to the first that does not; call it again once
        all of them have been answered. Under a budget each is reserved durably, in blocks."""
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
                yield replace(ask, again=partial(self._again, ask.key))
        finally:
            self._return(block)
            self._left.extendleft(reversed(block + refused))

    def _fill(self, block: deque[Ask], refused: deque[Ask], asks: Iterator[Ask]) -> int:
        """Reserve the next asks and put them in `block`; returns how many there are.

        After the first that does not fit only those are taken that a server has had before: for
        them the money is held already, and their answers are wanted.
        """
        calls: dict[str, float] = {}
        while len(block) < self._block and not (refused and not self._waiting):
            ask = self._left.popleft() if self._left else next(asks, None)
            if ask is None:
                break
            most = self._most(ask)
            if ask.key in self._waiting:
                self._in_flight[ask.key] = (most, self._waiting.pop(ask.key))
            elif refused or not self._fits(most):
                refused.append(ask)
                continue
            else:
                self._in_flight[ask.key] = (most, most)
                self._held += most
                calls[ask.key] = most
            block.append(ask)
        if calls:
            self._write({"calls": calls} | self._place)
        return len(block)

    @property
    def _place(self) -> dict[str, Any]:
        return {"at": self._journal.index.end, "lasting": self._lasting}

    def _return(self, block: Iterable[Ask]) -> None:
        """Give back what was reserved and never handed out."""
        returned = []
        for ask in block:
            _, reserved = self._in_flight.pop(ask.key)
            if ask.key in self._had:
                self._waiting[ask.key] = reserved
            else:
                self._held -= reserved
                returned.append(ask.key)
        if returned:
            self._write({"returned": returned})

    def _again(self, key: str) -> bool:
        """Whether a request may be made once more, the last one being paid for perhaps."""
        most, total = self._in_flight[key]
        if not self._fits(most):
            self._short = True
            return False
        self._in_flight[key] = (most, total + most)
        self._held += most
        self._write({"calls": {key: most}} | self._place)
        return True

    def settled(self, answer: Answer, row: dict[str, Any]) -> dict[str, Any]:
        """The journal row of an answer, with what it cost."""
        most, reserved = self._in_flight.pop(answer.key, (0.0, 0.0))
        self._held -= reserved
        if self.price is None:
            return row | {"cost": None} if self._is_api else row
        cost = _cost(answer.usage, self.price) + answer.unmetered * most
        self._spent += cost
        self.total += cost
        return row | {"cost": cost}

    def goes_on(self) -> bool:
        """Whether, with all that was granted answered, the next ask fits after all."""
        return bool(self._left) and self._fits(self._most(self._left[0]))

    @property
    def cost(self) -> float | None:
        """Dollars for what was settled here; None where there is no price."""
        return None if self.price is None else self.total

    @property
    def is_spent(self) -> bool:
        """Whether an ask was left out, or not repeated, for want of money."""
        return bool(self._left) or self._short

    def line(self) -> str:
        """How far the budget went that leaves least."""
        limit = min(self._limits, key=self._left_of)
        spent = limit.dollars - self._left_of(limit)
        return (
            f"the budget is spent: {dollars(spent)} of {dollars(limit.dollars)} "
            f"({limit.setting}), and the next call may cost more than is left"
        )

    def _left_of(self, limit: Limit) -> float:
        return limit.dollars - limit.elsewhere - self._spent - self._held

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
        key = content_id(self._reserved.index.end, row)
        self._reserved.append({"id": key, "fault": None} | row)
        self._reserved.commit()


def most_tokens(ask: Ask) -> int:
    """Prompt tokens that there can be at most: the tokenizers of today's models fall back to
    bytes, so that no text has more tokens than bytes of UTF-8."""
    texts = [ask.text or ""] if ask.messages is None else [m["content"] for m in ask.messages]
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    return size + AROUND_MESSAGE * len(texts) + AROUND_ALL
