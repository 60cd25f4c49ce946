"""How a judge is asked and what its answer says: pairwise, reasoned, pointwise, rating.

`pairwise` shows both responses, in both orders, and reads the log-probabilities of A and B:
position bias is the norm in LLM judges (Zheng et al. 2023, 2306.05685; Lee et al. 2023,
2309.00267), and half the difference of the two log-odds cancels what is constant in it. `reasoned`
is the same after reasons: the judge thinks first, and A and B are read where its text ends in the
verdict. `pointwise` grades each response alone by yes or no, few-shot examples first, and compares
the grades' log-odds; a very small model can judge in this way and in no other. `rating` grades each
by the expectation of 1 to 10 over their log-probabilities (direct RLAIF, Lee et al. 2023).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from aif.llm import SPELLED_TOKENS, Answer
from aif.llm.verdict_text import (
    is_refusal,
    parse_choice,
    parse_rating,
    parse_verdict,
    verdict_in_json,
)
from aif.stats.odds import probability

LEAD = "Verdict:"  # what stands before the option that a reasoned answer ends in
STRUCTURED_TOKENS = 32  # {"verdict": "A"}, with room for a server that breaks lines in it

AB, YES_NO = ("A", "B"), ("Yes", "No")

Logprobs = dict[str, float]

# A judged text that holds a verdict of its own must not come out of the judge's mouth as one.
_VERDICT = re.compile(r"\bverdict(?=\W{0,12}(?:is\W{1,6})?(?:[a-z]{4,12}\W{1,4})?[AB]\b)", re.I)


@dataclass(frozen=True, slots=True)
class Protocol:
    """One way of asking. In an order "ab" or "ba" both responses are shown, in "a" or "b" one.

    `of_logprobs` and `of_text` are what one answer says, in [0, 1]: how far it is for the first
    option, or how high it rates. `of_texts` makes one number of several read from text.
    """

    options: tuple[str, ...]
    orders: tuple[str, ...]
    tokens: int  # that an answer may take where its log-probabilities are read
    tokens_of_text: int  # ... where its text is
    of_logprobs: Callable[[Logprobs], float]
    of_text: Callable[[str], float | None]
    of_texts: Callable[[Sequence[float]], float]
    reasons: bool = False
    clamp: tuple[float, float] = (0.0, 1.0)  # default of `label.clamp`

    @property
    def compares(self) -> bool:
        """Whether a call shows both responses rather than grades one."""
        return len(self.orders[0]) == 2

    def schema(self) -> dict[str, Any]:
        """The JSON schema of an answer for servers that hold a model to one; the verdict is last,
        after the reasons."""
        verdict = {"verdict": {"type": "string", "enum": list(self.options)}}
        found = {"reasoning": {"type": "string"}} | verdict if self.reasons else verdict
        return {
            "type": "object",
            "properties": found,
            "required": list(found),
            "additionalProperties": False,
        }

    def harmless(self, text: str) -> str:
        """A judged text whose own verdict lines, if it has any, cannot be read as the judge's."""
        return _VERDICT.sub(lambda found: found[0][0] + " " + found[0][1:], text)

    def read(self, answer: Answer, structured: bool = False) -> tuple[float | None, str | None]:
        """(what the answer says in [0, 1], fault): one of the two is None.

        Of several samples the mean of what those with a verdict say. Where one of them is known by
        its text alone all are read as texts: a sure 1 would outweigh what the others leave open.
        """
        if answer.fault:
            return None, answer.fault
        soft = [answer.logprobs] if answer.logprobs is not None else list(answer.ends)
        if not all(math.isfinite(value) for one in soft if one for value in one.values()):
            return None, "malformed"
        if answer.logprobs is not None:
            return self.of_logprobs(answer.logprobs), None
        texts = [self._said(text, structured) for text in answer.texts]
        soft += [None] * (len(texts) - len(soft))
        said = [both for both in zip(soft, texts, strict=True) if both != (None, None)]
        if not said:
            return None, _why_unparsed(answer)
        if all(one is not None for one, _ in said):
            return fmean(self.of_logprobs(one) for one, _ in said if one is not None), None
        return self.of_texts([self._hard(*both) for both in said]), None

    def _said(self, text: str, structured: bool) -> float | None:
        if not structured:
            return self.of_text(text)
        found = verdict_in_json(text, self.options)
        return None if found is None else self.of_text(self.options[found.option])

    def _hard(self, one: Logprobs | None, said: float | None) -> float | None:
        """What a sample says as a text; one that was led to its verdict has none of its own."""
        return said if one is None or said is not None else self.of_text(max(one, key=one.get))


def _odds(options: tuple[str, str]) -> Callable[[Logprobs], float]:
    first, second = options
    return lambda logprobs: probability(logprobs[first] - logprobs[second])


def _choice(options: tuple[str, str]) -> Callable[[str], float | None]:
    def of_text(text: str) -> float | None:
        choice = parse_choice(text, options)
        return None if choice is None else float(1 - choice)

    return of_text


def _counted(values: Sequence[float]) -> float:
    """k of n: the Krichevsky-Trofimov estimate, so that one hard answer says 0.75 rather than a
    certainty that it has not earned."""
    return (sum(values) + 0.5) / (len(values) + 1)


def _stated(text: str) -> float | None:
    found = parse_verdict(text, AB)
    return None if found is None else float(1 - found.option)


LOWEST, HIGHEST = 1, 10


def _share(rating: float) -> float:
    """A rating as a share of the scale, each taken as the middle of its tenth: 1 is 0.05 and 10 is
    0.95, so that no response is ever infinitely better than another."""
    p = (rating - LOWEST + 0.5) / (HIGHEST - LOWEST + 1)
    return 1 - (1 - p)  # as `odds.probability`: what is flipped twice is the same to the bit


def _expected(logprobs: Logprobs) -> float:
    """The mean rating over those that have a probability; they need not add up to 1."""
    top = max(logprobs.values())
    weights = {int(option): math.exp(value - top) for option, value in logprobs.items()}
    return _share(sum(n * w for n, w in weights.items()) / math.fsum(weights.values()))


def _rated(text: str) -> float | None:
    rating = parse_rating(text, LOWEST, HIGHEST)
    return None if rating is None else _share(rating)


PROTOCOLS = {
    "pairwise": Protocol(
        options=AB,
        orders=("ab", "ba"),
        tokens=1,
        tokens_of_text=16,
        of_logprobs=_odds(AB),
        of_text=_choice(AB),
        of_texts=_counted,
    ),
    # Reasons make a model sure of whatever they lead to; Bai et al. 2022 (2212.08073, section 4.1)
    # found labels kept within 40 to 60 per cent to train better and more robustly.
    "reasoned": Protocol(
        options=AB,
        orders=("ab", "ba"),
        tokens=512,
        tokens_of_text=512,
        of_logprobs=_odds(AB),
        of_text=_stated,
        of_texts=_counted,
        reasons=True,
        clamp=(0.4, 0.6),
    ),
    "pointwise": Protocol(
        options=YES_NO,
        orders=("a", "b"),
        tokens=1,
        tokens_of_text=16,
        of_logprobs=_odds(YES_NO),
        of_text=_choice(YES_NO),
        of_texts=_counted,
    ),
    "rating": Protocol(
        options=tuple(str(n) for n in range(LOWEST, HIGHEST + 1)),
        orders=("a", "b"),
        tokens=SPELLED_TOKENS,
        tokens_of_text=16,
        of_logprobs=_expected,
        of_text=_rated,
        of_texts=fmean,
    ),
}


def _why_unparsed(answer: Answer) -> str:
    if any(is_refusal(text) for text in answer.texts):
        return "refused"
    if not any(text.strip() for text in answer.texts):
        return "empty"
    return "truncated" if answer.finish == "length" else "unparsed"
