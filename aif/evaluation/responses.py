"""What a policy's responses are like: the figures of its column in an evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aif.data.readers import Question
from aif.llm.verdict_text import is_refusal
from aif.stats.diversity import distinct, self_bleu
from aif.stats.intervals import Bootstrap
from aif.store.records import Comparison, Prompt


@dataclass(slots=True)
class Measured:
    """A policy's response to a prompt, and what was found of it, as far as anything was."""

    policy: str
    prompt: Prompt
    response: str | None
    fault: str | None
    ended: bool = False  # by the policy itself
    score: float | None = None  # the reward model's, normalised
    gold: float | None = None  # the judge's grade, log-odds of yes
    kl: float | None = None  # log p / p_ref, nats

    @property
    def words(self) -> int | None:
        """How many there are between blanks."""
        return None if self.response is None else len(self.response.split())

    @property
    def refusal(self) -> bool | None:
        """Whether the policy declines; None where nothing was heard of it."""
        if self.response is None:
            return True if self.fault == "refused" else None
        return is_refusal(self.response)

    def row(self) -> dict[str, Any]:
        """Its line of evaluation.jsonl."""
        names = ("response", "fault", "words", "refusal", "score", "gold", "kl")
        found = {name: getattr(self, name) for name in names}
        return {"policy": self.policy, "prompt_id": self.prompt.id} | found


def comparison(first: Measured, second: Measured) -> Comparison | None:
    """What a judge is shown of two responses to one prompt; None where one is missing."""
    if first.response is None or second.response is None:
        return None
    return Comparison.of(first.prompt.messages, first.response, second.response)


def figures(
    rows: Sequence[Measured], questions: Sequence[Question], bootstrap: Bootstrap, seed: int
) -> dict[str, Any]:
    """All that is told of one policy by its responses alone, `rows` being its to `questions`."""
    texts = [row.response for row in rows if row.response is not None]
    found = {name: bootstrap.mean([getattr(row, name) for row in rows])
             for name in ("gold", "score", "kl", "words")}  # fmt: skip
    return {
        "responses": len(texts),
        "faults": dict(Counter(row.fault for row in rows if row.fault)),
        "gold": found["gold"] if found["gold"]["n"] else None,
        "score": found["score"] if found["score"]["n"] else None,
        "kl": found["kl"] if found["kl"]["n"] else None,
        "words": found["words"],
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "self_bleu": self_bleu(texts, seed),
        **_refusals(rows, questions, bootstrap),
    }


def _refusals(
    rows: Sequence[Measured], questions: Sequence[Question], bootstrap: Bootstrap
) -> dict[str, Any]:
    """How often the policy declines; where prompts are marked, what asks for harm apart from what
    does not: there it is over-refusal."""

    def rate(of: set[bool | None]) -> dict[str, Any]:
        some = (row.refusal for row, q in zip(rows, questions, strict=True) if q.harmful in of)
        return bootstrap.rate([None if value is None else float(value) for value in some])

    found = {"refusal_rate": rate({True, False, None})}
    if any(question.harmful is not None for question in questions):
        found |= {"refusal_rate_harmful": rate({True}), "over_refusal_rate": rate({False, None})}
    return found
