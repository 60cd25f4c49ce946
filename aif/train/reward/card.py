"""A reward model's report card: its accuracy, overall and by kind of pair, and its calibration.

The card is about pairs that the model did not learn from. A pair is right if the better response
has the higher score; equal scores are half right. The card is the same whichever response is first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from aif.stats.calibration import CONFIDENT, accuracy, calibration


@dataclass(frozen=True, slots=True)
class ScoredPair:
    """A comparison with the scores of its two responses, its AI label and a person's choice."""

    comparison_id: str
    prompt_id: str
    score_first: float
    score_second: float
    words_first: int
    words_second: int
    p_first: float | None = None  # of the AI label
    by_principle: Mapping[str, float | None] = field(default_factory=dict)
    p_human: float | None = None

    @property
    def delta(self) -> float:
        return self.score_first - self.score_second

    @property
    def words_more(self) -> int:
        return self.words_first - self.words_second


def report_card(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """All statistics of these pairs, without the statistics for which the pairs have no labels."""
    card: dict[str, Any] = {"pairs": len(pairs)}
    for name, key in (("ai", "p_first"), ("human", "p_human")):
        decided = [pair for pair in pairs if getattr(pair, key) not in (None, 0.5)]
        labels = [getattr(pair, key) for pair in decided]
        if decided:
            scored = list(zip([pair.delta for pair in decided], labels, strict=True))
            longer = list(zip([pair.words_more for pair in decided], labels, strict=True))
            card[name] = {
                **accuracy(scored),
                "longer_wins": accuracy(longer)["accuracy"],
                "calibration": calibration(scored),
                "by_length": _by_length(scored, longer),
            }
            if name == "ai":
                confident = [(d, p) for d, p in scored if not CONFIDENT[0] <= p <= CONFIDENT[1]]
                card["ai"]["confident"] = accuracy(confident)
                card["ai"]["by_confidence"] = _by_confidence(scored)
                labeled = [pair for pair in pairs if pair.p_first is not None]
                card["by_principle"] = _by_principle(labeled)
    return card


def _by_confidence(scored: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
    """Accuracy where the label's winner has a probability of 0.5-0.6, 0.6-0.7, ..."""
    parts = []
    edges = (0.5, 0.6, 0.7, 0.8, 0.9, math.inf)
    for low, high in pairwise(edges):
        here = [(d, p) for d, p in scored if low <= max(p, 1 - p) < high]
        parts += [{"from": low, **accuracy(here)}] if here else []
    return parts


def _by_principle(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """Accuracy by each principle of the AI labels."""
    names = dict.fromkeys(name for pair in pairs for name in pair.by_principle)
    return {
        name: accuracy(
            (pair.delta, p) for pair in pairs if (p := pair.by_principle.get(name)) is not None
        )
        for name in names
    }


def _by_length(
    scored: Sequence[tuple[float, float]], longer: Sequence[tuple[int, float]]
) -> list[dict[str, Any]]:
    """Accuracy where the better response is the shorter, about as long, the longer."""
    ranges = ((-math.inf, -10), (-10, -2), (-2, 3), (3, 11), (11, math.inf))
    parts = []
    for low, high in ranges:
        here = [
            pair for pair, (words, p) in zip(scored, longer, strict=True)
            if low <= words * (1 if p > 0.5 else -1) < high
        ]  # fmt: skip
        if here:
            bounds = [None if math.isinf(bound) else bound for bound in (low, high)]
            parts.append({"words_more": bounds, **accuracy(here)})
    return parts
