"""The judges of a run, and which of their calls a comparison needs.

    [judge]                                [label]
    model = "openai:small"                 consensus = "mean"        # or majority, unanimous
    [[panel]]                              escalate_below = 0.2      # margin |2p - 1|
    model = "openai:large"                 escalate = "panel"        # or orders, reasoned

Every judge is asked about every comparison. With `label.escalate_below` a cheap pass comes first,
one order alone ("orders"), the first judge alone ("panel") or without reasons ("reasoned"), and the
rest is asked only where it leaves a comparison open. What is needed is a function of the answers
that the journal has, so a run that is cut short goes on as if it had not been, and another
threshold asks only what is new.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aif.config.settings import LabelSettings, LLMSettings, Settings
from aif.errors import InputError, shown
from aif.judge.aggregate import ROUNDING, both_shown, consensus_of, label_of
from aif.judge.calls import Work, count, judge_of, verdicts_of
from aif.judge.judge import Cell, Judge
from aif.run import Run
from aif.store import jsonl
from aif.store.journal import Index, Reader
from aif.store.records import SERVICE_FAULTS, Comparison, Label, Verdict, content_id

Found = list[tuple[Verdict, dict[str, Any]]]  # verdicts with their journal rows
Rows = Callable[[], Iterable[Comparison]]


@dataclass(frozen=True, slots=True)
class Seat:
    """A judge and what its panel calls it: its model, with a number where that is there twice, and
    with "reasoned" where it is asked once more with reasons."""

    name: str
    judge: Judge


Part = tuple[Seat, list[Cell]]


class Panel:
    """The judges of a run, one or several; see the module docstring. Build it with `panel_of`."""

    def __init__(
        self,
        seats: Sequence[Seat],
        label: LabelSettings,
        weights: dict[str, float],
        reasoned: Sequence[Seat] = (),
    ):
        self.seats = [*seats, *reasoned]
        self.weights = weights
        self.first = seats[0].judge
        self._seats, self._reasoned = seats, reasoned
        self.escalates = label.escalate_below is not None
        self._label = label

    def judged(self, comparison: Comparison, journal: Reader) -> tuple[Found, Label | None]:
        """The verdicts on a comparison, and the label that they come to.

        The label is None while a call that the comparison needs was never made.
        """
        found, label = self._come_to(self._cheap(comparison), comparison, journal)
        if label is None or not self._is_open(label):
            return found, label
        every, label = self._come_to(self.full(comparison), comparison, journal)
        seen = {verdict.id for verdict, _ in found}
        return found + [pair for pair in every if pair[0].id not in seen], label

    def rules(self) -> dict[str, Any]:
        """How the judges are heard, where there is more than one and all of its calls."""
        rules: dict[str, Any] = {}
        if len(self._seats) > 1:
            rules["consensus"] = {"rule": self._label.consensus, "weights": self.weights}
        if self.escalates:
            label = self._label
            rules["escalation"] = {"below": label.escalate_below, "by": label.escalate}
        return rules

    def count(self, rows: Rows, journal: Reader) -> list[tuple[Seat, Work]]:
        """The calls that are needed as far as the answers tell, judge by judge."""
        return [(seat, self._count(seat, rows(), journal)) for seat in self.seats]

    def full(self, comparison: Comparison) -> list[Part]:
        """All calls that a comparison may need: those that its label is made of where it is
        open."""
        return _cells(self._reasoned or self._seats, comparison)

    def _cheap(self, comparison: Comparison) -> list[Part]:
        """The calls that every comparison needs."""
        every = _cells(self._seats, comparison)
        if not self.escalates or self._reasoned:
            return every
        if self._label.escalate == "panel":
            return every[:1]
        return [
            (seat, [cell for cell in cells if cell.order in _one_order(seat.judge, comparison)])
            for seat, cells in every
        ]

    def _is_open(self, label: Label) -> bool:
        """Whether the label of the cheap pass is too close to even.

        A null is, where another judge may know better; but not while the first one's server is to
        blame, which is asked again.
        """
        if self._label.escalate_below is None or label.fault == "identical":
            return False
        if label.p_first is None:
            return self._label.escalate != "orders" and label.fault not in SERVICE_FAULTS
        margin = abs(2 * label.p_first - 1)
        # Less the rounding, so that a threshold holds from both sides; 1 is for everything.
        below = self._label.escalate_below
        return below == 1 or margin < below - ROUNDING

    def _count(self, seat: Seat, rows: Iterable[Comparison], journal: Reader) -> Work:
        perhaps: set[bytes] = set()

        def needed(comparison: Comparison) -> list[Cell]:
            cheap = self._cheap(comparison)
            if not self.escalates:
                return _of(seat, cheap)
            _, label = self._come_to(cheap, comparison, journal)
            every = _of(seat, [*cheap, *self.full(comparison)])
            if label is None:
                perhaps.update(bytes.fromhex(cell.id) for cell in every)
            return every if label and self._is_open(label) else _of(seat, cheap)

        work = count(needed, rows, journal.index)
        perhaps -= work.missing.keys() | journal.index.answered.keys()
        return replace(work, perhaps=len(perhaps))

    def _come_to(
        self, parts: Iterable[Part], comparison: Comparison, journal: Reader
    ) -> tuple[Found, Label | None]:
        """The verdicts of some calls, and their label; None while one of them was never made."""
        found: Found = []
        labels: dict[str, Label] = {}
        asked = 0
        for seat, cells in parts:
            own = list(verdicts_of(seat.judge, cells, comparison, journal))
            if seat.name != seat.judge.model.model:
                own = [(replace(verdict, judge=seat.name), row) for verdict, row in own]
            found += own
            asked += len(cells)
            labels[seat.name] = label_of(
                comparison,
                [verdict for verdict, _ in own],
                seat.judge.constitution,
                seat.judge.protocol,
                self._label.quorum,
                list(dict.fromkeys(cell.order for cell in cells)),
            )
        if len(found) < asked:
            return found, None
        if len(self._seats) == 1:
            (label,) = labels.values()
            return found, label
        rule, quorum = self._label.consensus, self._label.quorum
        return found, consensus_of(labels, rule, self.weights, quorum)


def _one_order(judge: Judge, comparison: Comparison) -> Sequence[str]:
    """The order that the cheap pass shows; all of them where responses are graded alone.

    Which response comes first is drawn by their texts. So a judge's liking for a position is no
    liking for the first response, and a pair that stands the other way round is asked the same.
    """
    if not both_shown(judge.orders):
        return judge.orders
    texts = sorted((comparison.first, comparison.second))
    shown_first = texts[int(content_id("one order", comparison.prompt_id, *texts)[0], 16) % 2]
    return judge.orders[:1] if shown_first == comparison.first else judge.orders[1:]


def _cells(seats: Iterable[Seat], comparison: Comparison) -> list[Part]:
    return [(seat, seat.judge.cells(comparison)) for seat in seats]


def _of(seat: Seat, parts: Iterable[Part]) -> list[Cell]:
    return [cell for one, cells in parts if one is seat for cell in cells]


def summed(works: Iterable[tuple[Seat, Work]], index: Index) -> Work:
    """The work of all judges together."""
    every = [work for _, work in works]
    kept = sum(work.kept for work in every)
    return Work(
        comparisons=every[0].comparisons,
        kept=kept,
        missing={key: name for work in every for key, name in work.missing.items()},
        failed_before=sum(work.failed_before for work in every),
        unused=len(index.answered) - kept,
        perhaps=sum(work.perhaps for work in every),
    )


def turns(
    panel: Panel, works: Iterable[tuple[Seat, Work]], rows: Rows, journal: Reader
) -> Iterator[tuple[Seat, set[bytes]]]:
    """Who is asked what, one judge after the other, till no answer calls for more.

    `works` is what is known to be needed now. No call comes twice, whatever becomes of it.
    """
    asked: set[bytes] = set()
    while True:
        before = len(asked)
        for seat, work in works:
            if fresh := work.missing.keys() - asked:
                asked |= fresh
                yield seat, fresh
        if len(asked) == before or not panel.escalates:
            return
        works = panel.count(rows, journal)


@dataclass
class Saving:
    """Distinct calls that labels are made of, against those of the full protocol."""

    panel: Panel
    comparisons: int = 0  # that got more than the cheap pass
    needed: set[bytes] = field(default_factory=set)
    full: set[bytes] = field(default_factory=set)

    def add(self, comparison: Comparison, found: Found) -> None:
        """Take in a comparison that has a label, with the verdicts it is made of."""
        parts = self.panel.full(comparison)
        full = {bytes.fromhex(cell.id) for _, cells in parts for cell in cells}
        needed = {bytes.fromhex(verdict.id) for verdict, _ in found}
        self.full |= full
        self.needed |= needed
        self.comparisons += bool(full) and full <= needed

    def summary(self) -> dict[str, int]:
        """How many comparisons got more, the calls that labels took, and those of asking all."""
        return {
            "comparisons": self.comparisons,
            "calls": len(self.needed),
            "calls_of_all": len(self.full),
        }


def models_of(settings: Settings) -> list[LLMSettings]:
    """The models of all seats: every judge that the settings name, the first one first, and once
    more where some of it may be asked with reasons."""
    label = settings.label
    more = label.escalate_below is not None and label.escalate == "reasoned"
    return [settings.judge, *settings.panel] * (1 + more)


def panel_of(run: Run, constitution: Path, control_tokens: Sequence[Iterable[str]] = ()) -> Panel:
    """The judges that a run's settings describe, with the constitution checked for each.

    `control_tokens` are those of every model, in the order of `models_of`, where they are known.
    Raises InputError for a judge that is there twice, for weights of nobody, and where there is
    nothing to ask besides the cheap pass.
    """
    label = run.settings.label
    models = [run.settings.judge, *run.settings.panel]
    every = models_of(run.settings)
    known = list(control_tokens) or [()] * len(every)
    seats: list[Seat] = []
    taken: dict[str, int] = defaultdict(int)
    for model, tokens in zip(models, known, strict=False):
        judge = judge_of(run, constitution, tokens, model)
        if any(judge.question_ids == seat.judge.question_ids for seat in seats):
            raise InputError(
                "panel", "model", got=f"{model.model} twice", expected="judges that differ"
            )
        taken[model.model] += 1
        again = taken[model.model]
        seats.append(Seat(f"{model.model}#{again}" if again > 1 else model.model, judge))
    weights = _weights(label, [seat.name for seat in seats])
    _check_escalation(label, seats, weights)
    # The template of one's own is for the protocol of the cheap pass.
    deeper = label.model_copy(update={"protocol": "reasoned", "template": None})
    reasoned = [
        Seat(f"{seat.name}, reasoned", judge_of(run, constitution, tokens, model, deeper))
        for seat, model, tokens in zip(
            seats, every[len(models) :], known[len(models) :], strict=False
        )
    ]
    weights |= {one.name: weights[seat.name] for one, seat in zip(reasoned, seats, strict=False)}
    return Panel(seats, label, weights, reasoned)


def _weights(label: LabelSettings, names: list[str]) -> dict[str, float]:
    given = label.judge_weights
    strangers = given.keys() - set(names)
    if strangers:
        raise InputError(
            "label", "judge_weights", got=shown(min(strangers)), expected=f"of {', '.join(names)}"
        )
    audited = _audited(Path(label.weights_from)) if label.weights_from else None
    weights = {}
    for name in names:
        if audited is not None and name not in audited | given:
            raise InputError(
                label.weights_from, "weights", got=f"nothing for {name}", expected="every judge"
            )
        weights[name] = given.get(name, 1.0 if audited is None else audited.get(name, 1.0))
    if not sum(weights.values()):
        raise InputError("label", "judge_weights", got="0 for all", expected="one above 0")
    return weights


def _audited(path: Path) -> dict[str, float]:
    """What `aif audit` found the judges to be worth."""
    try:
        found = jsonl.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        raise InputError(path, "", got="no such JSON", expected="what `aif audit` wrote") from None
    weights = found.get("weights") if isinstance(found, dict) else None
    if not isinstance(weights, dict) or not all(
        isinstance(weight, int | float) and weight >= 0 for weight in weights.values()
    ):
        got = shown(json.dumps(weights))
        raise InputError(path, "weights", got=got, expected="judges with a number from 0")
    return weights


def _check_escalation(
    label: LabelSettings, seats: Sequence[Seat], weights: dict[str, float]
) -> None:
    if label.escalate_below is None:
        return
    if label.escalate == "panel":
        if len(seats) < 2:
            raise InputError("label", "escalate", got="'panel', of one judge", expected="[[panel]]")
        if not weights[seats[0].name]:
            raise InputError(
                "label", "judge_weights", got=f"0 for {seats[0].name}",
                expected="more, as it is asked first and mostly alone",
            )  # fmt: skip
    elif label.escalate == "reasoned":
        if any(seat.judge.protocol == "reasoned" for seat in seats):
            raise InputError(
                "label", "escalate", got="'reasoned', of judges that reason at once",
                expected="another label.protocol, for the cheap pass",
            )  # fmt: skip
    elif not any(both_shown(seat.judge.orders) for seat in seats):
        raise InputError(
            "label", "escalate", got="'orders', of single responses",
            expected="a protocol that shows both, as label.protocol = \"pairwise\"",
        )  # fmt: skip
