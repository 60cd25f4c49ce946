"""The bound on the KL of the best of n."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from aif.stats.best_of import best_of_n_kl


def test_the_best_of_n_lies_no_further_than_its_bound():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(0.63629, abs=1e-5)
    bounds = [best_of_n_kl(n) for n in range(1, 65)]
    assert all(a < b for a, b in pairwise(bounds))
    p = np.random.default_rng(0).dirichlet(np.ones(50))
    for n, bound in enumerate(bounds, start=1):
        best = np.diff(np.cumsum(p) ** n, prepend=0.0)  # of outcomes in order of their reward
        kl = sum(b * math.log(b / a) for a, b in zip(p, best, strict=True) if b > 0)
        assert kl <= bound + 1e-9


def test_the_bound_is_reached_where_no_two_scores_are_equal():
    # Uniform scores: the best of 2 has density 2u, whose KL from uniform is log 2 - 1/2.
    grid = [(n + 0.5) / 10_000 for n in range(10_000)]
    exact = sum(2 * u * math.log(2 * u) for u in grid) / len(grid)
    assert best_of_n_kl(2) == pytest.approx(exact, abs=1e-4)
