"""The statistics of an audit, by hand and against what is known."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("krippendorff")

from aif.auditing.card import Judgement, judge_card, position, weight
from aif.auditing.verdict_counts import VerdictTable
from aif.data.human import Item
from aif.stats import intervals
from aif.stats.agreement import (
    agreement,
    alpha,
    annotators,
    at_equal_length,
    longer_wins,
    temperature,
)
from aif.stats.intervals import Bootstrap
from aif.stats.odds import probability
from aif.store.records import Label, Verdict

BOOTSTRAP = Bootstrap(seed=0, resamples=200)


def item(n: int, people: tuple[float, ...] = (1.0,), **more) -> Item:
    return Item(f"c{n}", f"p{n}", more.pop("more_words", 1), people, **more)


def judgement(n: int, p_first: float | None, people=(1.0,), **more) -> Judgement:
    null = Label.null(f"c{n}", "refused")
    label = null if p_first is None else Label(f"c{n}", p_first, None, 2, None)
    return Judgement(item(n, people, **more), label)


def add(table: VerdictTable, verdict: Verdict, of: Item) -> None:
    table.add(verdict, of.people, of.subset)


def card(judgements, table=None, model="judge", **options):
    return judge_card(judgements, table or VerdictTable(), model, BOOTSTRAP, **options)


def test_people_are_the_majority_and_no_one_where_there_is_none():
    assert item(0, (1.0, 0.0, 1.0)).people == 1.0
    assert item(0, (0.5, 0.5, 0.0)).people == 0.5
    for choices in ((), (1.0, 0.0), (1.0, 0.5, 0.0)):
        assert item(0, choices).people is None


def test_agreement_by_hand():
    judge = [1.0, 1.0, 0.0, 0.5, None, 1.0, 0.5, None]
    people = [1.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.5, None]
    figures = agreement(judge, people, BOOTSTRAP)
    assert (figures["people"], figures["people_ties"], figures["no_verdict"]) == (7, 2, 1)
    assert figures["agreement"]["mean"] == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert figures["agreement"]["n"] == 4
    # Of seven that people decided: two wins, a tie; the missing verdict is a miss and counts.
    assert figures["exact"]["mean"] == pytest.approx(3 / 7)
    assert figures["exact"]["n"] == 7
    # Of six with both: 3 the same; by chance 1.0: 3 x 2, 0.0: 1 x 2, 0.5: 2 x 2 of 36.
    chance = (3 * 2 + 1 * 2 + 2 * 2) / 36
    assert figures["kappa"] == pytest.approx((0.5 - chance) / (1 - chance))


def test_a_null_is_counted_and_enters_no_share():
    nulls = [judgement(n, None) for n in range(5)]
    figures = card([*nulls, judgement(5, 0.9), judgement(6, 0.2)])
    assert figures["null"] == {"refused": 5}
    assert figures["agreement"]["n"] == 2
    assert figures["agreement"]["mean"] == 0.5
    assert figures["exact"]["mean"] == pytest.approx(1 / 7)
    only = card(nulls)
    assert only["agreement"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert only["kappa"] is None
    assert only["calibration"] is None
    assert weight(only) is None


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    draw, covered = random.Random(0), 0
    for _ in range(100):
        values = [float(draw.random() < 0.7) for _ in range(60)]
        interval = BOOTSTRAP.rate(values)
        covered += interval["low"] <= 0.7 <= interval["high"]
    assert 88 <= covered <= 100


def test_many_values_are_not_bootstrapped(monkeypatch):
    monkeypatch.setattr(intervals, "MOST", 10)
    interval = Bootstrap(seed=0, resamples=0).rate([1.0] * 8 + [0.0] * 8)
    assert (interval["mean"], interval["n"]) == (0.5, 16)
    assert interval["low"] == pytest.approx(0.2800, abs=1e-4)  # Wilson's, 8 of 16


def test_krippendorffs_alpha_of_his_example():
    """The three coders of Wikipedia's article on it, whose nominal alpha is 0.691."""
    raters = [
        "*****3412113313"[:15].replace("3313", "33*3"),
        "1*21334 3*******".replace(" ", ""),
        "**2134 4*21133*4".replace(" ", ""),
    ]
    ratings = [[None if c == "*" else float(c) for c in row] for row in raters]
    assert {len(row) for row in ratings} == {15}
    assert alpha(ratings) == pytest.approx(0.691, abs=5e-4)


def test_there_is_no_alpha_of_one_rater_or_one_answer():
    assert alpha([[1.0, 0.0]]) is None
    assert alpha([[1.0, 1.0], [1.0, 1.0]]) is None
    assert alpha([[1.0, None], [None, 0.0]]) is None
    assert alpha([[1.0, 0.0, 0.5], [1.0, 0.0, 0.5]]) == 1


def test_annotators_by_hand():
    choices = [(1.0, 1.0, 1.0), (1.0, 1.0, 0.0), (0.0, 0.5), (1.0,)]
    shares = annotators(choices, BOOTSTRAP)
    assert shares["agreement"]["mean"] == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert shares["agreement"]["n"] == 3
    assert shares["unanimous"] == pytest.approx(1 / 3)
    assert shares["most"] == 3
    assert annotators([(1.0,), ()], BOOTSTRAP) is None


def test_longer_wins_is_of_the_same_pairs_for_both():
    judge = [1.0, 1.0, 0.0, 0.5, None, 1.0]
    people = [1.0, 0.0, 1.0, 1.0, 1.0, 0.5]
    words = [3, 3, 3, 3, 3, -3]
    shares = longer_wins(judge, people, words, BOOTSTRAP)
    assert (shares["judge"]["n"], shares["people"]["n"]) == (3, 3)
    assert shares["judge"]["mean"] == pytest.approx(2 / 3)
    assert shares["people"]["mean"] == pytest.approx(2 / 3)
    alone = longer_wins(judge, [None] * 6, words, BOOTSTRAP)
    assert alone["people"] is None
    assert (alone["judge"]["n"], alone["judge"]["mean"]) == (4, 0.5)
    assert longer_wins([1.0], [1.0], [0], BOOTSTRAP)["judge"]["n"] == 0


def test_at_equal_length_a_judge_of_length_is_no_judge():
    draw = random.Random(1)
    words = [round(draw.gauss(0, 20)) for _ in range(600)]
    likes_long = [float(draw.random() < probability(w / 6)) for w in words]
    people = [float(draw.random() < probability(w / 10)) for w in words]
    raw = agreement(likes_long, people, BOOTSTRAP)["agreement"]
    even = at_equal_length(likes_long, people, words, BOOTSTRAP)
    assert raw["low"] > 0.65
    assert even["mean"] == pytest.approx(0.5, abs=0.1)
    assert even["low"] < 0.5 < even["high"]
    knows = [p if draw.random() < 0.8 else 1 - p for p in people]
    assert at_equal_length(knows, people, words, BOOTSTRAP)["mean"] == pytest.approx(0.8, abs=0.06)


def test_a_temperature_undoes_overconfidence():
    draw = random.Random(2)
    rows = []
    for n in range(600):
        truth = draw.gauss(0, 1)
        chosen = float(draw.random() < probability(truth))
        rows.append(judgement(n, probability(3 * truth), (chosen,)))
    figures = card(rows, calibrate=True)
    fitted = figures["temperature"]
    assert fitted["temperature"] == pytest.approx(3, rel=0.3)
    assert fitted["ece"] < 0.6 * fitted["ece_before"]
    assert fitted["fitted_on"] + fitted["n"] == 600
    assert figures["calibration"]["ece"] == pytest.approx(fitted["ece_before"], abs=0.03)
    assert card(rows)["temperature"] is None
    assert temperature([(1.0, 1.0)] * 19) is None


def test_the_two_halves_of_a_calibration_share_no_prompt():
    rows = [judgement(n, 0.9, more_words=n + 1) for n in range(200)]
    rows = [Judgement(Item(r.item.comparison_id, "one prompt", 1, (1.0,)), r.label) for r in rows]
    assert card(rows, calibrate=True)["temperature"] is None


def test_calibration_before_and_after_is_of_the_half_that_is_not_fitted():
    def rows(prompt: str, right: int, n: int) -> list[Judgement]:
        return [
            Judgement(
                Item(f"{prompt}{k}", prompt, 1, (float(k < right),)),
                Label(f"{prompt}{k}", 0.9, None, 2, None),
            )
            for k in range(n)
        ]

    both = rows("fitted", 20, 30) + rows("held out", 40, 40)
    fits = (card(both, seed=seed, calibrate=True)["temperature"] for seed in range(20))
    fitted = next(one for one in fits if one and one["fitted_on"] == 30)
    assert fitted["n"] == 40
    assert fitted["ece_before"] == pytest.approx(0.1)
    assert fitted["ece"] == pytest.approx(1 / 3, abs=0.01)


def test_bare_choices_claim_no_certainty():
    rows = [judgement(0, 1.0), judgement(1, 0.0), judgement(2, 0.5)]
    assert card(rows)["calibration"] is None
    assert card([*rows, judgement(3, 0.8)])["calibration"]["bins"]


def verdict(n: int, order: str, p: float | None, principle: str = "kind") -> Verdict:
    fault = None if p is not None else "refused"
    return Verdict(f"v{n}{order}{principle}", f"c{n}", principle, order, "j", None, p, fault, {})


def test_position_by_hand():
    """ab and ba of six pairs: twice the same winner, twice whatever is shown first, once whatever
    is shown second, and one verdict missing."""
    verdicts = [(0.9, 0.8), (0.2, 0.1), (0.9, 0.1), (0.8, 0.3), (0.1, 0.9), (0.9, None)]
    table = VerdictTable()
    for n, (ab, ba) in enumerate(verdicts):
        for order, p in (("ba", ba), ("ab", ab)):  # as they come from a journal, in any order
            add(table, verdict(n, order, p), item(n))
    bias = position(table.of(), BOOTSTRAP)
    assert bias["consistency"]["mean"] == pytest.approx(2 / 5)
    assert (bias["first"], bias["second"]) == (2 / 5, 1 / 5)
    # First shown wins: ab > 0.5 four times, ba < 0.5 thrice; the other four are for the second.
    assert bias["bias"] == pytest.approx((7 - 4) / 11)
    assert bias["right"]["ab"]["mean"] == pytest.approx(4 / 6)
    assert bias["right"]["ba"]["mean"] == pytest.approx(2 / 6)  # the missing one is not right
    assert table.of().faults == {"refused": 1}


def test_orders_are_held_against_those_of_the_same_judge():
    table = VerdictTable()
    add(table, verdict(0, "ab", 0.9), item(0))
    add(table, replace(verdict(0, "ba", 0.9), judge="another"), item(0))
    assert position(table.of(), BOOTSTRAP)["consistency"]["n"] == 0


def test_nobody_is_right_on_a_pair_that_people_call_even():
    table = VerdictTable()
    for order, p in (("ab", 0.5), ("ba", 0.9)):
        add(table, verdict(0, order, p), item(0, (0.5,)))
    right = position(table.of(), BOOTSTRAP)["right"]
    assert [right[order]["n"] for order in ("ab", "ba")] == [0, 0]


def test_a_judge_that_grades_one_by_one_has_no_position():
    table = VerdictTable()
    for order in ("a", "b"):
        add(table, verdict(0, order, 0.7), item(0))
    assert position(table.of(), BOOTSTRAP) is None


def test_a_shared_grade_is_one_call():
    table = VerdictTable()
    shared = Verdict("v", "c0", "kind", "a", "j", None, 0.5, None, {"prompt_tokens": 7})
    add(table, shared, item(0))
    add(table, shared, item(1))
    assert (table.paid.calls, table.paid.tokens) == (1, {"prompt_tokens": 7})
    assert table.of().verdicts == 2


def test_by_principle_and_by_subset():
    rows, table = [], VerdictTable()
    for n in range(4):
        one = item(n, subset="even" if n % 2 == 0 else "odd")
        by_principle = {"kind": 0.9, "grim": 0.1 if n else None}
        rows.append(Judgement(one, Label(one.comparison_id, 0.9, None, 2, None, by_principle)))
        for name, p in by_principle.items():
            add(table, verdict(n, "ab", p, name), one)
    figures = card(rows, table)
    assert figures["by_principle"]["kind"]["agreement"]["mean"] == 1
    assert figures["by_principle"]["grim"]["agreement"] | {"low": 0, "high": 0} == {
        "mean": 0, "low": 0, "high": 0, "n": 3
    }  # fmt: skip
    assert figures["by_principle"]["grim"]["fault_rate"] == pytest.approx(1 / 4)
    assert figures["by_principle"]["kind"]["faults"] == {}
    assert {name: part["pairs"] for name, part in figures["by_subset"].items()} == {
        "even": 2, "odd": 2
    }  # fmt: skip
    assert figures["by_subset"]["even"]["faults"] == {"refused": 1}
    assert figures["by_subset"]["odd"]["faults"] == {}
    assert card(rows[:1], table)["by_subset"] == {}  # one subset is the whole


def test_self_preference():
    rows = [
        judgement(0, 0.9, (0.0,), models=("gpt-x", "other")),
        judgement(1, 0.2, (1.0,), models=("other", "gpt-x")),
        judgement(2, 0.2, (0.0,), models=("gpt-x", "other")),
        judgement(3, 0.9, (1.0,), models=("gpt-x", "gpt-x")),
        judgement(4, 0.9, (1.0,), models=("other", "another")),
    ]
    for model in ("gpt-x", "openai:gpt-x"):
        share = card(rows, model=model)["self_preference"]
        assert share["judge"]["n"] == 3
        assert share["judge"]["mean"] == pytest.approx(2 / 3)
        assert share["people"]["mean"] == 0
        assert share["more"]["mean"] == pytest.approx(2 / 3)
    assert card(rows, model="nobody")["self_preference"] is None


def test_weights_are_log_odds_clipped_at_zero():
    def of(right: int, n: int) -> float:
        return weight({"agreement": {"mean": right / n, "n": n}})

    assert of(75, 100) == pytest.approx(math.log(75.5 / 25.5))
    assert of(40, 100) == 0
    assert of(50, 100) == 0
    assert of(90, 100) > of(80, 100) > 0
    assert of(10, 10) == pytest.approx(math.log(10.5 / 0.5))  # and not infinite
