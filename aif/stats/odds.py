"""Probabilities and log-odds, one the other's inverse."""

from __future__ import annotations

import math

MAX_LOG_ODDS = 30.0  # 1 - p is lost to rounding beyond this


def probability(log_odds: float) -> float:
    """The logistic function, with the log-odds cut at +-30.

    It is rounded to what leaves 1 - p exact, so that swapped responses flip a label and no more.
    """
    p = 1 / (1 + math.exp(-max(-MAX_LOG_ODDS, min(MAX_LOG_ODDS, log_odds))))
    return 1 - (1 - p)


def log_odds(p: float) -> float:
    """The inverse of `probability`, in +-30; log_odds(1 - p) is -log_odds(p)."""
    if not 0 < p < 1:
        return MAX_LOG_ODDS if p >= 1 else -MAX_LOG_ODDS
    return max(-MAX_LOG_ODDS, min(MAX_LOG_ODDS, math.log(p) - math.log1p(-p)))
