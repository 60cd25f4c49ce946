"""95 % intervals of a mean or a share: bootstrapped over prompts, or Wilson's.

Prompts are what is drawn at random. The percentiles of a bootstrap are too narrow for few prompts;
they are widened as Student's t is wider than the normal distribution (Hesterberg 2014, 1411.5279:
the expanded percentile interval).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from aif.stats.odds import Value

CONFIDENCE = 0.95
MOST = 10_000  # values to bootstrap a share of: with more, Wilson's interval says the same


def wilson(right: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a share of `right` in `n`, `right` rounded to a whole number.

    It takes the `n` for independent.
    """
    from scipy.stats import binomtest

    ends = binomtest(round(right), n).proportion_ci(CONFIDENCE, "wilson")
    return float(ends.low), float(ends.high)


class Bootstrap:
    """Draws of prompts with replacement; the same draws for every statistic of `n` prompts."""

    def __init__(self, seed: int, resamples: int):
        self._seed, self._resamples = seed, resamples
        self.weights = lru_cache(maxsize=2)(self._weights)

    def _weights(self, n: int) -> np.ndarray:
        """How often each of `n` prompts is in each draw, [R, n]."""
        draw = np.random.default_rng([self._seed, n])
        return draw.multinomial(n, np.full(n, 1 / n), size=self._resamples).astype(float)

    def interval(self, statistic_R: np.ndarray, n: int) -> tuple[float, float]:
        """The interval of a statistic, from its values in the draws of `n` prompts."""
        from scipy.stats import norm, t

        tail = norm.cdf(np.sqrt(n / (n - 1)) * t.ppf((1 - CONFIDENCE) / 2, n - 1))
        low, high = np.quantile(statistic_R, (tail, 1 - tail), axis=0)
        return low, high

    def mean(self, values: Sequence[Value]) -> dict[str, Any]:
        """{"mean", "low", "high", "n"} of the values that are not None. A key is None if `n` is too
        small for it."""
        values_n = np.array([value for value in values if value is not None], float)
        n = len(values_n)
        if n < 2:
            return {"mean": float(values_n[0]) if n else None, "low": None, "high": None, "n": n}
        low, high = self.interval(self.weights(n) @ values_n / n, n)
        return {"mean": float(values_n.mean()), "low": float(low), "high": float(high), "n": n}

    def rate(self, values: Sequence[Value]) -> dict[str, Any]:
        """`mean` of values in 0 to 1.

        The interval is Wilson's if all values are equal, since every draw is then the same, and for
        more than MOST values, since draws of these take much memory.
        """
        values = [value for value in values if value is not None]
        n = len(values)
        if n and (n > MOST or len(set(values)) == 1):
            low, high = wilson(sum(values), n)
            return {"mean": sum(values) / n, "low": low, "high": high, "n": n}
        return self.mean(values)
