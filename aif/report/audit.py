"""The audit's part of the page: judges side by side, and which of them to trust."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import Field

from aif.report import charts
from aif.report.charts import SERIES, Chart, Dot
from aif.report.overview import named
from aif.report.schema import Calibration, Estimate, Loose, state
from aif.run import Run

KINDS = ("identical", "empty", "order", "colon", "thought", "solution")


class Longer(Loose):
    """How often the longer response wins."""

    judge: Estimate = Estimate()
    people: Estimate | None = None


class Position(Loose):
    """What a judge owes to the order of showing."""

    consistency: Estimate = Estimate()
    first: float | None = None
    second: float | None = None
    bias: float | None = None


class Figures(Loose):
    """A judge over all pairs, or under one principle, or of one subset."""

    pairs: int = 0
    unlabelled: int = 0
    null: dict[str, int] = Field({})
    ties: int = 0
    agreement: Estimate = Estimate()
    exact: Estimate = Estimate()
    kappa: float | None = None
    longer_wins: Longer = Longer()
    position: Position | None = None
    faults: dict[str, int] = Field({})
    fault_rate: float | None = None


class Own(Loose):
    """How often a response of the judge's own model wins."""

    judge: Estimate = Estimate()
    people: Estimate = Estimate()


class Rescaled(Loose):
    """A temperature that was fitted on other prompts."""

    temperature: float | None = None
    ece_before: float | None = None
    ece: float | None = None
    n: int | None = None


class CanaryRate(Loose):
    """How many pairs of a kind flipped."""

    flips: int = 0
    rate: Estimate = Estimate()
    null: int = 0


class Cost(Loose):
    """What a judge took."""

    calls: int | None = None
    tokens: dict[str, int] = Field({})
    calls_timed: int | None = None
    seconds: float | None = None


class Card(Figures):
    """A judge's card."""

    name: str = "?"
    at_equal_length: Estimate | None = None
    self_preference: Own | None = None
    calibration: Calibration | None = None
    temperature: Rescaled | None = None
    by_principle: dict[str, Figures] = Field({})
    by_subset: dict[str, Figures] = Field({})
    canaries: dict[str, CanaryRate] = Field({})
    cost: Cost | None = None


class Annotators(Loose):
    """How far people agree among themselves."""

    agreement: Estimate = Estimate()
    alpha: float | None = None


class Audit(Loose):
    """audit.json"""

    rows: int | None = None
    people: int | None = None
    split: int = 0
    annotators: Annotators | None = None
    alpha: float | None = None
    judges: list[Card] = Field([])
    weights: dict[str, float] = Field({})


def audited(run: Run) -> dict[str, Any] | None:
    """The judges' cards as tables and charts; None where the run has no audit."""
    audit = state(run, "audit", Audit)
    if audit is None:
        return None
    pictures = [
        _forest(
            "audit-agreement", "Agreement with people",
            [_dot(card, card.agreement) for card in audit.judges],
        ),
        _forest(
            "audit-longer", "How often the longer response wins",
            [_dot(card, card.longer_wins.judge, card.longer_wins.people) for card in audit.judges],
            "people",
        ),
        _calibration(audit.judges),
    ]  # fmt: skip
    return {
        "audit": audit,
        "rows": [row for card in audit.judges for row in _rows(audit, card)],
        "canaries": [
            (named(card.name), [card.canaries.get(kind) for kind in KINDS])
            for card in audit.judges
            if card.canaries
        ],
        "kinds": KINDS,
        "charts": [picture for picture in pictures if picture],
    }


def _rows(audit: Audit, card: Card) -> Iterator[dict[str, Any]]:
    """A line for a judge, and one for each principle and subset where there are several."""
    yield {"name": named(card.name), "part": "", "found": card, "card": card,
           "weight": audit.weights.get(card.name)}  # fmt: skip
    for parts in (card.by_principle, card.by_subset):
        if len(parts) > 1:
            for name, found in parts.items():
                yield {"name": named(card.name), "part": name, "found": found, "card": None,
                       "weight": None}  # fmt: skip


def _forest(name: str, title: str, dots: Sequence[Dot | None], mark: str = "") -> Chart | None:
    known = [dot for dot in dots if dot]
    return charts.forest(name, title, known, "share", 0.5, mark=mark) if known else None


def _dot(card: Card, found: Estimate, people: Estimate | None = None) -> Dot | None:
    if found.mean is None:
        return None
    mark = people.mean if people else None
    return Dot(named(card.name), found.mean, found.low, found.high, found.n, mark)


def _calibration(cards: Sequence[Card]) -> Chart | None:
    """As many judges as there are colours."""
    bins = {
        f"{named(card.name)}, ECE {card.calibration.ece:.3f}": [
            (bin.confidence, bin.accuracy, bin.n) for bin in card.calibration.bins
        ]
        for card in cards
        if card.calibration and card.calibration.bins and card.calibration.ece is not None
    }
    shown = dict(list(bins.items())[: len(SERIES)])
    if not shown:
        return None
    axes = ("confidence in the winner", "share of choices that agree")
    return charts.calibration("audit-calibration", "Calibration", shown, axes)
