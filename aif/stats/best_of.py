"""How far the best of n samples can lie from the policy that they were drawn from."""

from __future__ import annotations

import math


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n: an upper bound in nats on the KL from the policy, for n >= 1.

    It is often given as the value itself (Stiennon et al. 2020, 2009.01325); that it is a bound is
    shown by Beirami et al. 2024, 2401.01879.
    """
    return math.log(n) - (n - 1) / n
