"""How varied texts are, by hand and at the ends of the scale."""

from __future__ import annotations

import pytest

from aif.stats.diversity import MOST, distinct, self_bleu


def test_distinct_by_hand():
    texts = ["the cat sat", "The cat ran away", "cat"]
    # the cat sat the cat ran away cat: 5 words of 8; the cat, cat sat, the cat, cat ran, ran away
    assert distinct(texts, 1) == pytest.approx(5 / 8)
    assert distinct(texts, 2) == pytest.approx(4 / 5)
    assert distinct(["one"], 2) is None
    assert distinct([], 1) is None


def test_no_n_gram_reaches_from_one_text_into_the_next():
    assert distinct(["a b", "a b"], 2) == pytest.approx(1 / 2)


def test_self_bleu_is_100_of_one_text_said_again_and_low_of_others():
    pytest.importorskip("sacrebleu")
    same = ["I hope that you will have a lovely day."] * 4
    assert self_bleu(same, 0) == pytest.approx(100)
    assert self_bleu(["good"] * 3, 0) == pytest.approx(100), "shorter than four words"
    other = ["the train leaves at nine", "bake it for an hour", "she sold her old car"]
    assert self_bleu(other, 0) < 10
    assert self_bleu([*same[:2], *other], 0) == pytest.approx(
        (200 + 3 * self_bleu(other, 0)) / 5, abs=3
    )
    assert self_bleu(["alone"], 0) is None


def test_self_bleu_takes_a_seeded_hundred():
    pytest.importorskip("sacrebleu")
    texts = [f"w{n % 7} w{n % 11} w{n % 13}" for n in range(2 * MOST)]
    assert self_bleu(texts, 0) == self_bleu(texts, 0)
    assert self_bleu(texts, 0) != self_bleu(texts, 1)
