"""A probability that the first of two responses wins: its log-odds, and who wins by it."""

from __future__ import annotations

import math

MAX_LOG_ODDS = 30.0  # 1 - p is lost to rounding beyond this
ROUNDING = 1e-12  # in p: this close to a tie is a tie

Value = float | None  # None: there is no answer


def probability(log_odds: float) -> float:
    """The logistic function, with the log-odds cut at +-30.

    It is rounded so that 1 - p is exact: swapped responses give exactly the swapped label.
    """
    p = 1 / (1 + math.exp(-max(-MAX_LOG_ODDS, min(MAX_LOG_ODDS, log_odds))))
    return 1 - (1 - p)


def log_odds(p: float) -> float:
    """The inverse of `probability`, in +-30; log_odds(1 - p) is -log_odds(p)."""
    if not 0 < p < 1:
        return MAX_LOG_ODDS if p >= 1 else -MAX_LOG_ODDS
    return max(-MAX_LOG_ODDS, min(MAX_LOG_ODDS, math.log(p) - math.log1p(-p)))


def winner(p_first: float, tie_margin: float = 0.0) -> int:
    """1: the first response wins, -1: the second, 0: `p_first` is within `tie_margin` of 0.5."""
    if abs(p_first - 0.5) <= tie_margin + ROUNDING:
        return 0
    return 1 if p_first > 0.5 else -1


def outcome(p_first: Value, tie_margin: float = 0.0) -> Value:
    """The same as points: 1.0 for a win of the first, 0.0 for a loss, 0.5 for a tie; None stays."""
    return None if p_first is None else (winner(p_first, tie_margin) + 1) / 2
