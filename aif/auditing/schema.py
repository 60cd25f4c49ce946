"""What `aif audit` writes: audit.json."""

from __future__ import annotations

from pydantic import Field

from aif.stats.schema import Calibration, Estimate, Loose


class Longer(Loose):
    """How often the longer response wins."""

    judge: Estimate = Estimate()
    people: Estimate | None = None


class Position(Loose):
    """The position bias of a judge."""

    consistency: Estimate = Estimate()
    first: float | None = None
    second: float | None = None
    bias: float | None = None


class PartCard(Loose):
    """A judge over all pairs, under one principle, or on one subset."""

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


class SelfPreference(Loose):
    """How often a response of the judge's own model wins."""

    judge: Estimate = Estimate()
    people: Estimate = Estimate()


class Temperature(Loose):
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
    """The calls, tokens and time of a judge."""

    calls: int | None = None
    tokens: dict[str, int] = Field({})
    calls_timed: int | None = None
    seconds: float | None = None


class JudgeCard(PartCard):
    """A judge's card."""

    name: str = "?"
    at_equal_length: Estimate | None = None
    self_preference: SelfPreference | None = None
    calibration: Calibration | None = None
    temperature: Temperature | None = None
    by_principle: dict[str, PartCard] = Field({})
    by_subset: dict[str, PartCard] = Field({})
    canaries: dict[str, CanaryRate] = Field({})
    cost: Cost | None = None


class Annotators(Loose):
    """How well people agree with each other."""

    agreement: Estimate = Estimate()
    alpha: float | None = None


class Audit(Loose):
    """audit.json"""

    rows: int | None = None
    people: int | None = None
    split: int = 0
    annotators: Annotators | None = None
    alpha: float | None = None
    judges: list[JudgeCard] = Field([])
    weights: dict[str, float] = Field({})
