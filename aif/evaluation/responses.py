"""A policy's responses, and the statistics of them that an evaluation reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aif.data.readers import Question
from aif.evaluation.schema import Evaluated
from aif.llm.verdict_text import is_refusal
from aif.stats.diversity import distinct, self_bleu
from aif.stats.intervals import Bootstrap
from aif.store.records import Comparison, Prompt


@dataclass(slots=True)
class PolicyResponse:
    """A policy's response to a prompt, with the numbers that the evaluation adds."""

    policy: str
    prompt: Prompt
    response: str | None
    fault: str | None
    ended: bool = False  # by the policy itself
    score: float | None = None  # by the reward model, normalised
    grade: float | None = None  # the judge's, log-odds of yes
    kl: float | None = None  # log p / p_ref, nats

    @property
    def words(self) -> int | None:
        """The number of words between spaces."""
        return None if self.response is None else len(self.response.split())

    @property
    def refusal(self) -> bool | None:
        """Whether the policy declines; None if it did not answer."""
        if self.response is None:
            return True if self.fault == "refused" else None
        return is_refusal(self.response)

    def row(self) -> Evaluated:
        """Its line of evaluation.jsonl."""
        return Evaluated(
            self.policy, self.prompt.id, self.response, self.fault, self.words, self.refusal,
            self.score, self.grade, self.kl,
        )  # fmt: skip


def comparison(first: PolicyResponse, second: PolicyResponse) -> Comparison | None:
    """The comparison of two responses to one prompt; None if one is missing."""
    if first.response is None or second.response is None:
        return None
    return Comparison.of(first.prompt.messages, first.response, second.response)


def response_stats(
    rows: Sequence[PolicyResponse], questions: Sequence[Question], bootstrap: Bootstrap, seed: int
) -> dict[str, Any]:
    """The statistics of one policy's responses; `rows` are its responses to `questions`."""
    texts = [row.response for row in rows if row.response is not None]
    gold, score, kl, words = (
        bootstrap.mean([getattr(row, name) for row in rows])
        for name in ("grade", "score", "kl", "words")
    )
    return {
        "responses": len(texts),
        "faults": dict(Counter(row.fault for row in rows if row.fault)),
        "gold": gold if gold["n"] else None,
        "score": score if score["n"] else None,
        "kl": kl if kl["n"] else None,
        "words": words,
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "self_bleu": self_bleu(texts, seed),
        **_refusals(rows, questions, bootstrap),
    }


def _refusals(
    rows: Sequence[PolicyResponse], questions: Sequence[Question], bootstrap: Bootstrap
) -> dict[str, Any]:
    """How often the policy declines. If prompts are marked as harmful or not, also the rate for
    each kind: to decline a prompt that is not harmful is over-refusal."""

    def rate(of: set[bool | None]) -> dict[str, Any]:
        some = (row.refusal for row, q in zip(rows, questions, strict=True) if q.harmful in of)
        return bootstrap.rate([None if value is None else float(value) for value in some])

    rates = {"refusal_rate": rate({True, False, None})}
    if any(question.harmful is not None for question in questions):
        rates |= {"refusal_rate_harmful": rate({True}), "over_refusal_rate": rate({False, None})}
    return rates
