"""Agreement of raters: people and a judge, several judges, several annotators.

A rater gives a pair one of three outcomes: 1.0 (the first response is better), 0.0 (the second) or
0.5 (neither). None is a missing verdict, not an outcome.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from aif.stats.intervals import MOST, Bootstrap
from aif.stats.odds import Value
from aif.stats.winrate import length_controlled

FEWEST = 20  # pairs on each side of a split to fit a temperature
TEMPERATURES = (0.05, 100.0)


def agreement(
    judge: Sequence[Value], people: Sequence[Value], bootstrap: Bootstrap
) -> dict[str, Any]:
    """A judge against people, pair by pair.

    `agreement`: the share of pairs on which the judge names the winner that people name, over pairs
    where people name one and the judge has a verdict; a tie of the judge counts half. `exact`: the
    share of equal outcomes over all pairs that people have decided, with ties; a missing verdict
    counts as unequal. Most papers print this one. `kappa`: Cohen's, over the three outcomes; null
    if both have one outcome throughout.
    """
    decided = [(j, p) for j, p in zip(judge, people, strict=True) if p is not None]
    both = [(j, p) for j, p in decided if j is not None]
    return {
        "people": len(decided),
        "people_ties": sum(p == 0.5 for _, p in decided),
        "no_verdict": len(decided) - len(both),
        "agreement": bootstrap.rate([1 - abs(j - p) for j, p in both if p != 0.5]),
        "exact": bootstrap.rate([float(j == p) for j, p in decided]),
        "kappa": kappa(Counter(both)),
    }


def kappa(counts: Mapping[tuple[float, float], int], halves: bool = False) -> float | None:
    """Cohen's kappa (1960) of two raters; `counts` says how often they gave which two outcomes.

    With `halves`, a tie of one of them agrees by half with a win (linear weights: Cohen 1968).
    None if both give one outcome throughout: chance then agrees as well.
    """
    if len({answer for pair in counts for answer in pair}) < 2:
        return None
    from sklearn.metrics import cohen_kappa_score

    a, b = zip(*((int(2 * a), int(2 * b)) for a, b in counts), strict=True)
    times, weights = list(counts.values()), "linear" if halves else None
    return float(cohen_kappa_score(a, b, labels=[0, 1, 2], weights=weights, sample_weight=times))


def alpha(raters: Sequence[Sequence[Value]]) -> float | None:
    """Krippendorff's nominal alpha (2004); `raters` has one row of outcomes for each rater.

    None with fewer than two raters, without a pair that two have rated, or with one outcome
    throughout.
    """
    if len(raters) < 2:
        return None
    ratings = np.array([[np.nan if one is None else one for one in row] for row in raters], float)
    ratings = ratings[:, (~np.isnan(ratings)).sum(0) >= 2]
    if len(set(ratings[~np.isnan(ratings)])) < 2:
        return None
    from krippendorff import alpha as krippendorff

    return float(krippendorff(reliability_data=ratings, level_of_measurement="nominal"))


def annotators(choices: Sequence[Sequence[float]], bootstrap: Bootstrap) -> dict[str, Any] | None:
    """Agreement among people, over pairs that two or more have judged; None without such pairs.

    `agreement` is the share of equal choices among all twos of a pair's annotators.
    """
    several = [row for row in choices if len(row) > 1]
    if not several:
        return None
    shares = []
    for row in several:
        twos = list(combinations(row, 2))
        shares.append(sum(a == b for a, b in twos) / len(twos))
    most = max(map(len, several))
    columns = [[row[k] if k < len(row) else None for row in several] for k in range(most)]
    return {
        "most": most,
        "agreement": bootstrap.rate(shares),
        "unanimous": sum(share == 1 for share in shares) / len(shares),
        "alpha": alpha(columns),
    }


def longer_wins(
    judge: Sequence[Value], people: Sequence[Value], more_words: Sequence[int], bootstrap: Bootstrap
) -> dict[str, Any]:
    """How often the longer response (in words) wins, by the judge and by people.

    A pair counts if the judge names a winner, and, if there are any choices of people, people too.
    """
    anyone = any(p is not None for p in people)
    rows = [
        (j, p, words)
        for j, p, words in zip(judge, people, more_words, strict=True)
        if words and j not in (None, 0.5) and not (anyone and p in (None, 0.5))
    ]
    by_people = [float((p > 0.5) == (words > 0)) for _, p, words in rows] if anyone else []
    return {
        "judge": bootstrap.rate([float((j > 0.5) == (words > 0)) for j, _, words in rows]),
        "people": bootstrap.rate(by_people) if by_people else None,
    }


def at_equal_length(
    judge: Sequence[Value], people: Sequence[Value], more_words: Sequence[int], bootstrap: Bootstrap
) -> dict[str, Any] | None:
    """The agreement if both responses had the same length.

    It is the value at zero of a regression of agreement on how much longer the response is that
    people chose. A judge that likes length loses what it owes to people who like it too. None if it
    cannot be fitted. Of more than MOST pairs an evenly spaced part is taken.
    """
    rows = [
        (1 - abs(j - p), words if p > 0.5 else -words)
        for j, p, words in zip(judge, people, more_words, strict=True)
        if j is not None and p not in (None, 0.5)
    ]
    rows = rows[:: -(-len(rows) // MOST) or 1]
    return length_controlled([r for r, _ in rows], [w for _, w in rows], bootstrap)


def self_preference(
    judge: Sequence[Value], people: Sequence[Value], own: Sequence[int], bootstrap: Bootstrap
) -> dict[str, Any] | None:
    """How often a response of the judge's own model wins, by the judge and by people (Panickssery
    et al. 2024, 2404.13076).

    `own` is 1 if the model wrote the first response, -1 if the second, 0 if neither or both. None
    if the judge and people have decided no such pair.
    """
    rows = [
        (j, p) if side > 0 else (1 - j, 1 - p)
        for j, p, side in zip(judge, people, own, strict=True)
        if side and j is not None and p is not None
    ]
    if not rows:
        return None
    more = bootstrap.mean([j - p for j, p in rows]) if len(rows) <= MOST else None
    return {
        "judge": bootstrap.rate([j for j, _ in rows]),
        "people": bootstrap.rate([p for _, p in rows]),
        "more": more,
    }


def temperature(fit: Sequence[tuple[float, float]]) -> float | None:
    """The T of maximum likelihood for sigmoid(delta / T), within TEMPERATURES; `fit` holds pairs of
    log-odds and a person's choice (Guo et al. 2017, 1706.04599). None for fewer than FEWEST."""
    if len(fit) < FEWEST:
        return None
    from scipy.optimize import minimize_scalar

    delta, chosen = (np.array(column, float) for column in zip(*fit, strict=True))

    def loss(log_t: float) -> float:
        z = delta / np.exp(log_t)
        return float((np.logaddexp(0, z) - chosen * z).mean())

    minimum = minimize_scalar(loss, bounds=tuple(np.log(TEMPERATURES)), method="bounded")
    return float(np.exp(minimum.x))
