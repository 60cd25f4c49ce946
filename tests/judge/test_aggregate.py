"""What several judges of one comparison come to."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aif.judge.aggregate import aggregate_judges
from aif.stats.odds import log_odds, probability
from aif.store.records import Label

RULES = ["mean", "majority", "unanimous"]
ODDS = st.floats(-9, 9)


def label(p: float | str, by_principle: dict | None = None, orders: float | None = None) -> Label:
    """A judge's label: a probability, or the fault that a null has."""
    if isinstance(p, str):
        return Label.null("c", p)
    return Label("c", p, None, 2, orders, {"kind": p} if by_principle is None else by_principle)


def consensus(rule: str, *votes: float | str, weights=(), quorum=1.0) -> Label:
    labels = {f"j{n}": label(p) for n, p in enumerate(votes)}
    weighed = dict(zip(labels, weights or [1.0] * len(votes), strict=True))
    return aggregate_judges(labels, rule, weighed, quorum)


@given(st.lists(st.tuples(ODDS, st.floats(0.1, 10)), min_size=1, max_size=6))
def test_mean_is_of_log_odds_by_weight(votes):
    odds, weights = zip(*votes, strict=True)
    joint = consensus("mean", *map(probability, odds), weights=weights)
    expected = math.fsum(o * w for o, w in votes) / math.fsum(weights)
    assert log_odds(joint.p_first) == pytest.approx(expected, abs=1e-6)
    assert joint.by_principle == {"kind": joint.p_first}
    assert joint.n_verdicts == 2 * len(votes)


@pytest.mark.parametrize("rule", RULES)
@given(st.lists(ODDS | st.just(0.0), min_size=1, max_size=5), st.data())
def test_swapping_the_responses_flips_the_consensus(rule, odds, data):
    weights = data.draw(st.lists(st.sampled_from([1.0, 2.0]), min_size=len(odds), max_size=9))
    weights = weights[: len(odds)]
    p = [probability(value) for value in odds]
    one = consensus(rule, *p, weights=weights)
    other = consensus(rule, *(1 - x for x in p), weights=weights)
    assert one.fault == other.fault
    if one.p_first is not None:
        assert one.p_first + other.p_first == pytest.approx(1, abs=1e-12)


def test_majority_is_the_side_with_most_weight_as_strong_as_those_on_it():
    joint = consensus("majority", 0.9, 0.6, 0.001)
    assert joint.p_first == pytest.approx(probability((log_odds(0.9) + log_odds(0.6)) / 2))
    assert joint.p_first > 0.5 > consensus("mean", 0.9, 0.6, 0.001).p_first
    assert consensus("majority", 0.9, 0.2, weights=(1, 3)).p_first == pytest.approx(0.2)
    assert consensus("majority", 0.9, 0.5, 0.5).p_first == 0.9  # who finds it even has no side


@pytest.mark.parametrize("votes", [(0.9, 0.4), (0.9, 0.8, 0.3, 0.1)])
def test_a_tie_of_sides_abstains(votes):
    joint = consensus("majority", *votes)
    assert (joint.p_first, joint.fault) == (None, "tied")
    assert joint.by_principle == {"kind": None}
    assert joint.by_judge == {f"j{n}": p for n, p in enumerate(votes)}


def test_unanimous_or_null():
    assert consensus("unanimous", 0.9, 0.6, 0.7).fault is None
    for votes in ((0.9, 0.6, 0.4), (0.9, 0.5)):
        joint = consensus("unanimous", *votes)
        assert (joint.p_first, joint.fault) == (None, "no_consensus")


@pytest.mark.parametrize("rule", RULES)
def test_all_even_is_even_and_one_judge_is_himself(rule):
    assert consensus(rule, 0.5, 0.5, 0.5).p_first == 0.5
    for p in (0.1, 0.123456789, 0.9999):
        assert consensus(rule, p).p_first == p


@pytest.mark.parametrize("rule", RULES)
def test_a_judge_with_faults_only_is_missed_by_its_weight(rule):
    joint = consensus(rule, 0.9, 0.8, "refused")
    assert (joint.p_first, joint.fault) == (None, "refused")
    assert joint.by_judge == {"j0": 0.9, "j1": 0.8, "j2": None}
    assert consensus(rule, 0.9, 0.8, "refused", quorum=0.67).p_first is None
    assert consensus(rule, 0.9, 0.9, "refused", quorum=0.66).p_first == pytest.approx(0.9)
    heavy = consensus(rule, 0.9, 0.9, "refused", weights=(1, 1, 3), quorum=0.66)
    assert heavy.p_first is None
    assert consensus(rule, "timeout", "refused", "timeout", quorum=0.01).fault == "timeout"


@pytest.mark.parametrize("rule", RULES)
def test_a_judge_of_no_weight_is_not_heard(rule):
    joint = consensus(rule, 0.9, 0.1, weights=(2, 0))
    assert joint.p_first == 0.9
    assert joint.by_judge == {"j0": 0.9, "j1": 0.1}


def test_principles_and_orders_are_of_those_who_have_them():
    labels = {
        "a": label(0.8, {"kind": 0.8, "warm": None}, 0.5),
        "b": label(0.6, {"kind": 0.6, "warm": 0.3}, 1.0),
        "c": label(0.7, {"kind": 0.7, "warm": 0.1}),
    }
    joint = aggregate_judges(labels, "unanimous", dict.fromkeys("abc", 1.0))
    assert joint.order_agreement == 0.75
    mean = (log_odds(0.3) + log_odds(0.1)) / 2
    assert joint.by_principle["warm"] == pytest.approx(probability(mean))
