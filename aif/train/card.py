"""A reward model's report card: how often it is right, where, and whether it knows when.

Judged are pairs that it did not learn from. A pair is right when the better response has the higher
score; equal scores are half right. Everything is the same whichever response is called first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from aif.winrate import wilson

BINS = 10
CONFIDENT = (0.3, 0.7)  # a label outside of these names a winner with some certainty


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


def accuracy(known: Iterable[tuple[float, float]]) -> dict[str, Any]:
    """{"n", "accuracy", "interval"} of (difference, probability that it should be positive).

    The interval is Wilson's at 95 %; it takes pairs for independent, which pairs of one prompt
    are not quite.
    """
    right = [
        0.5 if delta == 0 else float((delta > 0) == (p > 0.5)) for delta, p in known if p != 0.5
    ]
    if not right:
        return {"n": 0, "accuracy": None, "interval": None}
    return {
        "n": len(right),
        "accuracy": sum(right) / len(right),
        "interval": list(wilson(sum(right), len(right))),
    }


def calibration(known: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """How the probability that a score difference stands for, sigmoid(delta), matches how often
    the label agrees: expected calibration error (Guo et al. 2017, 1706.04599), Brier score, the
    loss, and the bins to draw.

    Each pair counts with its predicted winner first, so confidences lie in 0.5 to 1. A soft label
    agrees by its probability, so a model that has learned soft labels is calibrated to them.
    """
    confidence = np.array([1 / (1 + math.exp(-min(abs(delta), 700))) for delta, _ in known])
    agrees = np.array([p if delta >= 0 else 1 - p for delta, p in known])
    agrees = np.where([delta == 0 for delta, _ in known], 0.5, agrees)
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins = [
        {"confidence": float(confidence[here].mean()), "accuracy": float(agrees[here].mean()),
         "n": int(here.sum())}
        for number in range(BINS) if (here := place == number).any()
    ]  # fmt: skip
    gap = sum(bin["n"] * abs(bin["confidence"] - bin["accuracy"]) for bin in bins)
    clipped = np.clip(confidence, 1e-7, 1 - 1e-7)
    loss = -(agrees * np.log(clipped) + (1 - agrees) * np.log(1 - clipped))
    return {
        "ece": gap / len(known),
        "brier": float(((confidence - agrees) ** 2).mean()),
        "loss": float(loss.mean()),
        "bins": bins,
    }


def moments(values: Sequence[float]) -> dict[str, Any]:
    """{"n", "mean", "std"} and five quantiles of some scores."""
    return {
        "n": len(values),
        "mean": float(np.mean(values)),
        "std": float(np.std(values)),
        "quantiles": [float(q) for q in np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95))],
    }


def draw(card: Mapping[str, Any], folder: Path) -> list[Path]:
    """Pictures of a card in `folder`: calibration, score distributions, learning curve."""
    from aif.train.pictures import calibration_picture, curve_picture, scores_picture

    made = []
    if "ai" in card or "human" in card:
        made.append(calibration_picture(card, folder / "calibration.png"))
    if card.get("scores"):
        made.append(scores_picture(card["scores"], folder / "scores.png"))
    if len(card.get("curve", [])) > 1:
        made.append(curve_picture(card["curve"], folder / "curve.png"))
    return made


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
