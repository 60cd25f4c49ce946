"""The statistics of judged matches, on numbers whose truth is known."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

import numpy as np

from aif.stats.intervals import Bootstrap
from aif.stats.odds import outcome, winner
from aif.stats.winrate import (
    ELO,
    LEAST,
    Game,
    bradley_terry,
    length_controlled,
    match,
    ratings,
)


@pytest.fixture
def draw():
    return np.random.default_rng(0)


@pytest.fixture
def bootstrap():
    return Bootstrap(seed=0, resamples=400)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def inside(interval, truth) -> bool:
    return interval["low"] <= truth <= interval["high"]


# --- intervals


@pytest.mark.parametrize("n", [8, 20, 100])
def test_an_interval_of_a_mean_holds_the_truth_in_95_of_100_samples(draw, bootstrap, n):
    """Plain percentiles would in 88 of 100, of eight prompts; these in 93 or 94."""
    covered = [inside(bootstrap.mean(draw.normal(3, 2, n)), 3) for _ in range(1000)]
    assert 0.92 <= np.mean(covered) <= 0.97


@pytest.mark.parametrize("n", [6, 20, 100])
def test_an_interval_of_a_win_rate_holds_the_truth_too(draw, bootstrap, n):
    covered = [
        inside(bootstrap.rate((draw.random(n) < 0.6).astype(float)), 0.6) for _ in range(500)
    ]
    assert np.mean(covered) >= 0.91


def test_an_interval_is_a_function_of_seed_and_values(bootstrap):
    values = [1.0, 0.0, 1.0, 0.5, 1.0, 0.0]
    assert Bootstrap(0, 400).mean(values) == bootstrap.mean(values)
    assert bootstrap.mean(values) == bootstrap.mean(values)
    many = np.linspace(0, 1, 50)
    assert Bootstrap(1, 400).mean(many) != bootstrap.mean(many)


def test_nulls_are_no_numbers(bootstrap):
    values = [1.0, 2.0, 4.0]
    assert bootstrap.mean([None, *values, None]) == bootstrap.mean(values)
    assert bootstrap.mean(values)["n"] == 3
    nothing = {"mean": None, "low": None, "high": None, "n": 0}
    assert bootstrap.mean([None]) == bootstrap.rate([None]) == bootstrap.rate([]) == nothing


def test_one_value_has_no_interval(bootstrap):
    assert bootstrap.mean([2.5]) == {"mean": 2.5, "low": None, "high": None, "n": 1}


def test_to_win_or_tie_all_of_six_is_not_to_do_so_always(bootstrap):
    """Wilson's interval, where every draw is the same."""
    interval = bootstrap.rate([1.0] * 6)
    assert (interval["mean"], interval["high"]) == (1.0, 1.0)
    assert interval["low"] == pytest.approx(0.6097, abs=1e-4)
    assert bootstrap.rate([0.0] * 6)["high"] == pytest.approx(1 - 0.6097, abs=1e-4)
    assert bootstrap.rate([1.0])["low"] == pytest.approx(0.2065, abs=1e-4)
    ties = bootstrap.rate([0.5] * 6)
    assert ties["mean"] == 0.5
    assert (ties["low"], ties["high"]) == pytest.approx((0.1876, 0.8124), abs=1e-4)


# --- wins, losses, ties


def test_a_tie_is_what_is_within_the_margin_of_even():
    assert [outcome(p) for p in (0.51, 0.5, 0.49, None)] == [1.0, 0.5, 0.0, None]
    assert [winner(p) for p in (0.51, 0.5, 0.49)] == [1, 0, -1]
    assert [outcome(p, 0.1) for p in (0.61, 0.6, 0.5, 0.4, 0.39)] == [1.0, 0.5, 0.5, 0.5, 0.0]


def test_a_match_counts_wins_ties_losses_and_what_has_no_verdict(bootstrap):
    p_first = [0.9, 0.7, 0.5, 0.2, None]
    games = [Game(p, {"kind": p, "wise": 0.4}) for p in p_first]
    games[0] = Game(0.9, {"kind": None, "wise": 0.4})
    summary = match(games, 0.0, bootstrap)
    counts = [summary[name] for name in ("n", "wins", "ties", "losses", "null")]
    assert counts == [4, 2, 1, 1, 1]
    assert summary["win_rate"]["mean"] == pytest.approx(2.5 / 4)
    assert summary["soft_win_rate"]["mean"] == pytest.approx((0.9 + 0.7 + 0.5 + 0.2) / 4)
    assert summary["by_principle"] == {"kind": pytest.approx(0.5), "wise": 0.0}
    assert inside(summary["win_rate"], 2.5 / 4)
    wider = match(games, 0.25, bootstrap)
    assert [wider[name] for name in ("wins", "ties", "losses")] == [1, 2, 1]


def test_a_match_without_a_verdict_has_no_win_rate(bootstrap):
    summary = match([Game(None)] * 3, 0.0, bootstrap)
    assert (summary["n"], summary["null"]) == (0, 3)
    assert summary["win_rate"] == {"mean": None, "low": None, "high": None}
    assert summary["length_controlled"] is None
    assert summary["by_principle"] == {}


# --- length


def biased(draw, n, advantage, liking, longer):
    """(results, differences in words) by a judge who likes length, of a policy so much longer."""
    words = draw.normal(longer, 20, n).round()
    won = draw.random(n) < sigmoid(advantage + liking * np.tanh(words / words.std()))
    return won.astype(float), words


def test_a_win_rate_that_is_length_alone_is_gone_at_equal_length(draw, bootstrap):
    results, words = biased(draw, 1500, advantage=0.0, liking=2.5, longer=15)
    assert results.mean() > 0.65
    estimate = length_controlled(results, words, Bootstrap(0, 100))
    assert estimate["mean"] == pytest.approx(0.5, abs=0.06)
    assert inside(estimate, 0.5)


def test_a_real_advantage_stays_though_length_hides_it(draw):
    results, words = biased(draw, 1500, advantage=1.0, liking=2.5, longer=-15)
    assert results.mean() < 0.55
    estimate = length_controlled(results, words, Bootstrap(0, 100))
    assert estimate["mean"] == pytest.approx(sigmoid(1.0), abs=0.06)
    assert estimate["low"] > 0.6


def test_length_control_is_the_same_from_both_sides(draw):
    results, words = biased(draw, 80, advantage=0.5, liking=1.0, longer=5)
    results[:20] = 0.5
    few = Bootstrap(0, 100)
    estimate, turned = (
        length_controlled(results, words, few),
        length_controlled(1 - results, -words, few),
    )
    assert turned["mean"] == pytest.approx(1 - estimate["mean"], abs=1e-4)
    assert turned["low"] == pytest.approx(1 - estimate["high"], abs=1e-3)


def test_without_any_liking_for_length_it_is_the_win_rate(draw):
    results, words = biased(draw, 1500, advantage=0.6, liking=0.0, longer=30)
    estimate = length_controlled(results, words, Bootstrap(0, 100))
    assert estimate["mean"] == pytest.approx(results.mean(), abs=0.06)


def test_length_control_is_null_where_it_cannot_be_fitted(draw, bootstrap):
    results, words = biased(draw, LEAST, advantage=0.0, liking=0.0, longer=0)
    results[:2] = 0, 1
    assert length_controlled(results[1:], words[1:], bootstrap) is None, "too few"
    assert length_controlled(np.ones(40), np.arange(40), bootstrap) is None, "all won"
    assert length_controlled([0.0, 1.0] * 20, [7] * 40, bootstrap) is None, "all of one difference"
    nearly = np.array([0.0] + [1.0] * 39)
    assert length_controlled(nearly, np.arange(40), bootstrap) is None, "many draws won all"


# --- ratings


def played(draw, strengths, pairs, n):
    """Results of `pairs` on n prompts by players of these log strengths."""
    return {
        (a, b): list(map(float, draw.random(n) < sigmoid(strengths[a] - strengths[b])))
        for a, b in pairs
    }


STRENGTHS = {"base": -1.0, "sft": 0.0, "ppo": 0.4, "best": 0.6}
STAR = [(name, "sft") for name in ("base", "ppo", "best")]
ALL = [*STAR, ("base", "ppo"), ("base", "best"), ("ppo", "best")]


@pytest.mark.parametrize("pairs", [STAR, ALL], ids=["star", "all"])
def test_ratings_recover_known_strengths(draw, bootstrap, pairs):
    elo = ratings(played(draw, STRENGTHS, pairs, 4000), bootstrap)
    for name, strength in STRENGTHS.items():
        assert elo[name]["mean"] == pytest.approx(ELO * strength, abs=25)
        assert elo[name]["low"] < elo[name]["mean"] < elo[name]["high"]
        assert elo[name]["high"] - elo[name]["low"] < 60
    assert sum(one["mean"] for one in elo.values()) == pytest.approx(0, abs=1e-6)


def test_intervals_of_ratings_hold_the_truth(draw):
    few = Bootstrap(0, 200)
    covered = []
    for _ in range(60):
        elo = ratings(played(draw, STRENGTHS, STAR, 60), few)
        covered += [inside(elo[name], ELO * strength) for name, strength in STRENGTHS.items()]
    assert np.mean(covered) > 0.9


def test_two_players_by_hand(bootstrap):
    """3 of 4 won, and the tie that is added: 3.5 to 1.5."""
    elo = ratings({("a", "b"): [1.0, 1.0, 1.0, 0.0]}, bootstrap)
    apart = 400 * math.log10(3.5 / 1.5)
    assert elo["a"]["mean"] == pytest.approx(apart / 2)
    assert elo["b"]["mean"] == pytest.approx(-apart / 2)
    drawn = ratings({("a", "b"): [0.5, 0.5]}, bootstrap)
    assert drawn["a"]["mean"] == pytest.approx(0)


def test_who_won_all_has_a_rating_and_who_met_nobody_has_none(bootstrap):
    elo = ratings({("a", "b"): [1.0] * 9, ("c", "b"): [None] * 9}, bootstrap)
    assert set(elo) == {"a", "b"}
    assert elo["a"]["mean"] == pytest.approx(200 * math.log10(9.5 / 0.5))
    assert ratings({("a", "b"): [None]}, bootstrap) == {}
    assert ratings({}, bootstrap) == {}
    lone = ratings({("a", "b"): [1.0]}, bootstrap)["a"]
    assert (lone["low"], lone["high"]) == (None, None)


def test_strengths_that_no_chain_of_results_links_are_not_compared(bootstrap):
    games = {("a", "b"): [1.0, 0.0], ("c", "b"): [1.0, 1.0], ("d", "e"): [1.0, 0.0]}
    assert set(ratings(games, bootstrap)) == {"a", "b", "c"}


def test_bradley_terry_is_the_maximum_of_the_likelihood(draw):
    wins_RKK = draw.integers(1, 9, (3, 4, 4)).astype(float)
    found_RK = bradley_terry(wins_RKK)
    expected_RKK = (wins_RKK + wins_RKK.transpose(0, 2, 1)) * sigmoid(
        found_RK[:, :, None] - found_RK[:, None, :]
    )
    for wins_KK, expected_KK in zip(wins_RKK, expected_RKK, strict=True):
        # The gradient: everybody won as often as expected (a player's games with himself aside).
        assert wins_KK.sum(1) == pytest.approx(expected_KK.sum(1), abs=1e-5)
