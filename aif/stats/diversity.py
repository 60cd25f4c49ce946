"""Diversity of a policy's responses: distinct words, and how similar the texts are."""

from __future__ import annotations

import random
from collections.abc import Sequence

MOST = 100  # texts to compare with each other; the work grows with the square


def distinct(texts: Sequence[str], n: int) -> float | None:
    """The share of all n-grams of words that are different ones (Li et al. 2016, 1510.03055);
    None where there is no n-gram. It falls with the amount of text."""
    grams = [
        gram
        for text in texts
        if (words := text.casefold().split())
        for gram in zip(*(words[start:] for start in range(n)), strict=False)
    ]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(texts: Sequence[str], seed: int) -> float | None:
    """The mean BLEU, 0 to 100, of each text against all others (Zhu et al. 2018, 1802.01886): high
    is uniform. Of at most MOST texts, drawn by `seed`; None of fewer than two."""
    from sacrebleu import BLEU

    if len(texts) > MOST:
        texts = random.Random(f"self-bleu {seed}").sample(list(texts), MOST)
    if len(texts) < 2:
        return None
    bleu = BLEU(effective_order=True)  # texts of fewer than four words have no 4-grams
    scores = [
        bleu.sentence_score(text, [*texts[:n], *texts[n + 1 :]]).score
        for n, text in enumerate(texts)
    ]
    return sum(scores) / len(scores)
