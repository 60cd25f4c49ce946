"""How often a score is right, and whether its confidence matches that."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from aif.stats.intervals import wilson

BINS = 10
CONFIDENT = (0.3, 0.7)  # a label outside of these names a winner with some certainty


def accuracy(pairs: Iterable[tuple[float, float]]) -> dict[str, Any]:
    """{"n", "accuracy", "interval"} of (difference, probability that it should be positive).

    The interval is Wilson's at 95 %; it takes pairs for independent, which pairs of one prompt
    are not quite.
    """
    right = [
        0.5 if delta == 0 else float((delta > 0) == (p > 0.5)) for delta, p in pairs if p != 0.5
    ]
    if not right:
        return {"n": 0, "accuracy": None, "interval": None}
    return {
        "n": len(right),
        "accuracy": sum(right) / len(right),
        "interval": list(wilson(sum(right), len(right))),
    }


def calibration(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """How the probability that a score difference stands for, sigmoid(delta), matches how often
    the label agrees: expected calibration error (Guo et al. 2017, 1706.04599), Brier score, the
    loss, and the bins to draw.

    Each pair counts with its predicted winner first, so confidences lie in 0.5 to 1. A soft label
    agrees by its probability, so a model that has learned soft labels is calibrated to them.
    """
    confidence = np.array([1 / (1 + math.exp(-min(abs(delta), 700))) for delta, _ in pairs])
    agrees = np.array([p if delta >= 0 else 1 - p for delta, p in pairs])
    agrees = np.where([delta == 0 for delta, _ in pairs], 0.5, agrees)
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
        "ece": gap / len(pairs),
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
