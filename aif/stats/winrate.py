"""Win rates of judged matches, with their intervals.

Each result is of one prompt, and intervals are over prompts (`stats.intervals`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aif.stats.intervals import Bootstrap
from aif.stats.odds import Value, outcome

PENALTY = 100.0  # sklearn's C: so weak that it only keeps a slope finite
LEAST = 10  # prompts to fit a slope to
FITTED = 0.95  # of the resamples, for an interval of what cannot always be fitted
ELO = 400 / np.log(10)  # points a nat of log-odds


@dataclass(frozen=True, slots=True)
class Game:
    """One comparison of two policies' responses to a prompt."""

    p_first: Value  # None where there is no verdict
    by_principle: Mapping[str, Value] = field(default_factory=dict)
    more_words: int = 0  # of the first than of the second


def match(games: Sequence[Game], tie_margin: float, bootstrap: Bootstrap) -> dict[str, Any]:
    """Wins, ties and losses of the first policy against the second, over prompts. A tie is half."""
    results = [outcome(game.p_first, tie_margin) for game in games]
    judged = [game for game in games if game.p_first is not None]
    principles: dict[str, list[float]] = {}
    for game in judged:
        for name, p in game.by_principle.items():
            if p is not None:
                principles.setdefault(name, []).append(outcome(p, tie_margin))
    return {
        "n": len(judged),
        "wins": results.count(1.0),
        "ties": results.count(0.5),
        "losses": results.count(0.0),
        "null": results.count(None),
        "win_rate": _ends(bootstrap.rate(results)),
        "soft_win_rate": _ends(bootstrap.rate([game.p_first for game in games])),
        "length_controlled": length_controlled(
            [outcome(game.p_first, tie_margin) for game in judged],
            [game.more_words for game in judged],
            bootstrap,
        ),
        "by_principle": {name: float(np.mean(outcomes)) for name, outcomes in principles.items()},
    }


def length_controlled(
    results: Sequence[float], more_words: Sequence[int], bootstrap: Bootstrap
) -> dict[str, Any] | None:
    """The win rate if both policies' responses had the same length, as AlpacaEval 2 estimates it
    (Dubois et al. 2024, 2404.04475): a logistic regression of the result on tanh of the difference
    in words, in standard deviations of it, read where that is zero.

    None where it cannot be fitted: fewer than LEAST prompts, no difference in length, all won or
    all lost, or nearly so, that one draw in twenty is like that.
    """
    results_n, words_n = np.array(results, float), np.array(more_words, float)
    n = len(results_n)
    if n < LEAST or words_n.std() == 0:
        return None
    lengths_n = np.tanh(words_n / words_n.std())
    at_zero = _win_rate_at_zero(results_n, lengths_n, np.ones(n))
    rates = (_win_rate_at_zero(results_n, lengths_n, w_n) for w_n in bootstrap.weights(n))
    fitted_R = np.array([rate for rate in rates if rate is not None])
    if at_zero is None or len(fitted_R) < FITTED * len(bootstrap.weights(n)):
        return None
    low, high = bootstrap.interval(fitted_R, n)
    return {"mean": at_zero, "low": float(low), "high": float(high)}


def _win_rate_at_zero(results_n: np.ndarray, x_n: np.ndarray, weights_n: np.ndarray) -> Value:
    """The fitted probability of a win at x = 0, with weighted prompts."""
    from sklearn.linear_model import LogisticRegression

    # A tie is half a win and half a loss.
    won_n, lost_n = weights_n * results_n, weights_n * (1 - results_n)
    weight = np.concatenate([won_n, lost_n])
    some = weight > 0
    won = np.arange(len(weight)) < len(won_n)
    if len(set(won[some])) < 2:
        return None
    x = np.concatenate([x_n, x_n])[some, None]
    fit = LogisticRegression(C=PENALTY).fit(x, won[some], sample_weight=weight[some])
    return float(1 / (1 + np.exp(-fit.intercept_[0])))


def ratings(
    games: Mapping[tuple[str, str], Sequence[Value]], bootstrap: Bootstrap
) -> dict[str, dict[str, float]]:
    """Bradley-Terry strengths in Elo points, their mean 0: {"mean", "low", "high"} by name.

    `games` maps (first, second) to the results as `outcome` has them, prompt by prompt. Each pair
    that met gets one more game, a tie, so that a policy that won all games has a finite strength.
    Names without a result are left out.
    """
    kept, names = _connected(games)
    if not kept:
        return {}
    result_gn = np.array([[np.nan if r is None else r for r in games[pair]] for pair in kept])
    n = result_gn.shape[1]
    weights_Rn = np.vstack([np.ones(n), bootstrap.weights(n)])  # the first row: all, once each
    wins_Rg = weights_Rn @ np.nan_to_num(result_gn).T + 0.5
    games_Rg = weights_Rn @ (~np.isnan(result_gn)).T + 1.0
    wins_RKK = np.zeros((len(weights_Rn), len(names), len(names)))
    for g, (first, second) in enumerate(kept):
        i, j = names.index(first), names.index(second)
        wins_RKK[:, i, j] += wins_Rg[:, g]
        wins_RKK[:, j, i] += games_Rg[:, g] - wins_Rg[:, g]
    elo_RK = ELO * bradley_terry(wins_RKK)
    if n < 2:
        ends = [(None, None)] * len(names)
    else:
        ends = [
            (float(a), float(b)) for a, b in zip(*bootstrap.interval(elo_RK[1:], n), strict=True)
        ]
    return {
        name: {"mean": float(elo_RK[0, k]), "low": ends[k][0], "high": ends[k][1]}
        for k, name in enumerate(names)
    }


def bradley_terry(wins_RKK: np.ndarray, tolerance: float = 1e-9) -> np.ndarray:
    """Log strengths [R, K], mean 0, of players who won wins[r, i, j] games against each other
    (Bradley and Terry 1952); by minorization-maximization (Hunter 2004, The Annals of Statistics
    32:384, equation 3), which improves the likelihood at every step."""
    games_RKK = wins_RKK + wins_RKK.transpose(0, 2, 1)
    won_RK = wins_RKK.sum(2)
    log_RK = np.zeros(won_RK.shape)
    for _ in range(10_000):
        p_RK = np.exp(log_RK)
        new_RK = np.log(won_RK / (games_RKK / (p_RK[:, :, None] + p_RK[:, None, :])).sum(2))
        new_RK -= new_RK.mean(1, keepdims=True)
        moved = np.abs(new_RK - log_RK).max()
        log_RK = new_RK
        if moved < tolerance:
            break
    return log_RK


def _connected(
    games: Mapping[tuple[str, str], Sequence[Value]],
) -> tuple[list[tuple[str, str]], list[str]]:
    """The pairs with a result, and their names, in the largest group that results connect.
    Strengths of names that are not connected cannot be compared."""
    from scipy.sparse.csgraph import connected_components

    met = [pair for pair, results in games.items() if any(r is not None for r in results)]
    names = list(dict.fromkeys(name for pair in met for name in pair))
    if not names:
        return [], []
    linked = np.zeros((len(names), len(names)))
    for first, second in met:
        linked[names.index(first), names.index(second)] = 1
    _, part = connected_components(linked, directed=False)
    largest = np.bincount(part).argmax()
    names = [name for name, number in zip(names, part, strict=True) if number == largest]
    return [pair for pair in met if pair[0] in names], names


def _ends(estimate: Mapping[str, Any]) -> dict[str, Value]:
    return {key: estimate[key] for key in ("mean", "low", "high")}
