"""A reward model's report card: how often it is right, where, and whether it knows when.

Judged are pairs that it did not learn from. A pair is right when the better response has the higher
score; equal scores are half right. Everything is the same whichever response is called first.
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
    """A comparison with the scores of its two responses and what others say of it."""

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


def report_card(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """All figures of these pairs; what none of them can say is left out."""
    card: dict[str, Any] = {"pairs": len(pairs)}
    labelled = [pair for pair in pairs if pair.p_first is not None]
    for name, p_of in (("ai", _p_ai), ("human", _p_human)):
        known = [(pair.delta, p, pair) for pair in pairs if (p := p_of(pair)) not in (None, 0.5)]
        if known:
            card[name] = {
                **accuracy((delta, p) for delta, p, _ in known),
                "longer_wins": accuracy(
                    (pair.words_first - pair.words_second, p) for _, p, pair in known
                )["accuracy"],
                "calibration": calibration([(delta, p) for delta, p, _ in known]),
                "by_length": _by_length(known),
            }
    if labelled and "ai" in card:
        known = [(pair.delta, pair.p_first) for pair in labelled if pair.p_first != 0.5]
        card["ai"]["confident"] = accuracy(
            (delta, p) for delta, p in known if not CONFIDENT[0] <= p <= CONFIDENT[1]
        )
        card["ai"]["by_confidence"] = _by_confidence(known)
        card["by_principle"] = _by_principle(labelled)
    return card


def _p_ai(pair: ScoredPair) -> float | None:
    return pair.p_first


def _p_human(pair: ScoredPair) -> float | None:
    return pair.p_human


def _by_confidence(known: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
    """Accuracy where the label's winner has a probability of 0.5-0.6, 0.6-0.7, ..."""
    found = []
    edges = (0.5, 0.6, 0.7, 0.8, 0.9, math.inf)
    for low, high in pairwise(edges):
        here = [(d, p) for d, p in known if low <= max(p, 1 - p) < high]
        found += [{"from": low, **accuracy(here)}] if here else []
    return found


def _by_principle(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    names = dict.fromkeys(name for pair in pairs for name in pair.by_principle)
    found = {}
    for name in names:
        known = [
            (pair.delta, p) for pair in pairs if (p := pair.by_principle.get(name)) is not None
        ]
        found[name] = accuracy(known)
    return found


def _by_length(known: Sequence[tuple[float, float, ScoredPair]]) -> list[dict[str, Any]]:
    """Accuracy where the better response is the shorter, about as long, the longer."""
    ranges = ((-math.inf, -10), (-10, -2), (-2, 3), (3, 11), (11, math.inf))
    found = []
    for low, high in ranges:
        here = [
            (delta, p) for delta, p, pair in known
            if low <= (pair.words_first - pair.words_second) * (1 if p > 0.5 else -1) < high
        ]  # fmt: skip
        if here:
            bounds = [None if math.isinf(bound) else bound for bound in (low, high)]
            found.append({"words_more": bounds, **accuracy(here)})
    return found
