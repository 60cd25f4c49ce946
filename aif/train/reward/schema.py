"""What `aif reward` writes: reward-card.json."""

from __future__ import annotations

from pydantic import Field

from aif.stats.schema import Calibration, Loose, Rate


class LengthRate(Rate):
    """A share where the better response is longer by so many words."""

    words_more: tuple[float | None, float | None] = (None, None)


class ConfidenceRate(Rate):
    """A share where the label's winner has at least this probability."""

    least: float = Field(0.5, alias="from")


class CardPart(Rate):
    """A reward model held against one kind of label."""

    longer_wins: float | None = None
    calibration: Calibration = Calibration()
    by_length: list[LengthRate] = Field([])
    confident: Rate | None = None
    by_confidence: list[ConfidenceRate] = Field([])


class Spread(Loose):
    """Moments and quantiles (5, 25, 50, 75, 95 %) of scores."""

    n: int
    mean: float
    std: float
    quantiles: tuple[float, float, float, float, float]


class CurvePoint(Rate):
    """Accuracy after learning from so many comparisons."""

    pairs: int


class RewardCard(Loose):
    """reward-card.json"""

    pairs: int | None = None
    ai: CardPart | None = None
    human: CardPart | None = None
    by_principle: dict[str, Rate] = Field({})
    scores: dict[str, Spread] = Field({})
    curve: list[CurvePoint] = Field([])
