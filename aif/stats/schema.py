"""The shape of statistics in the JSON files of a run."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Loose(BaseModel):
    """A part of a JSON file. Any key may be missing, in a run of an earlier version or one that is
    not done."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Estimate(Loose):
    """A mean with its interval, as `stats.intervals` makes it."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    bound: bool = False  # of a KL: known as an upper bound alone


class Rate(Loose):
    """A share with Wilson's interval, as `stats.calibration.accuracy` makes it."""

    n: int = 0
    accuracy: float | None = None
    interval: tuple[float, float] | None = None


class Bin(Loose):
    """A bin of a calibration curve."""

    confidence: float
    accuracy: float
    n: int


class Calibration(Loose):
    """How well confidence matches accuracy, as `stats.calibration.calibration` makes it."""

    ece: float | None = None
    brier: float | None = None
    bins: list[Bin] = Field([])
