"""The judge protocols: what a call shows, and how its answer becomes a number.

`pairwise` shows both responses, in both orders, and reads the log-probabilities of A and B. LLM
judges have a position bias (Zheng et al. 2023, 2306.05685; Lee et al. 2023, 2309.00267); half the
difference of the two log-odds cancels the part of it that is constant. `reasoned` is the same after
reasons: the judge thinks first, and A and B are read where its text ends in the verdict.
`pointwise` grades each response alone by yes or no, after few-shot examples, and compares the
log-odds of the grades; a very small model can judge only in this way. `rating` grades each response
alone by the expected value of 1 to 10 under their log-probabilities (direct RLAIF, Lee et al.
2023).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from aif.llm import Answer
from aif.llm.option_logprobs import SPELLED_TOKENS
from aif.llm.verdict_text import (
    is_refusal,
    parse_choice,
    parse_rating,
    parse_verdict,
    verdict_in_json,
)
from aif.stats.odds import probability

LEAD = "Verdict:"  # stands before the option at the end of a reasoned answer
STRUCTURED_TOKENS = 32  # for {"verdict": "A"}, with room for line breaks

AB, YES_NO = ("A", "B"), ("Yes", "No")

Logprobs = dict[str, float]

# A verdict in a judged text: a judge that quotes it must not seem to give it.
_VERDICT = re.compile(r"\bverdict(?=\W{0,12}(?:is\W{1,6})?(?:[a-z]{4,12}\W{1,4})?[AB]\b)", re.I)


@dataclass(frozen=True, slots=True)
class Protocol:
    """One way to ask. The orders "ab" and "ba" show both responses, "a" and "b" one of them.

    `of_logprobs` and `of_text` turn one answer into a number in [0, 1]: how much it is for the
    first option, or how high it rates. `of_texts` turns those of several texts into one.
    """

    options: tuple[str, ...]
    orders: tuple[str, ...]
    tokens: int  # of an answer whose log-probabilities are read, at most
    tokens_of_text: int  # of an answer whose text is read, at most
    of_logprobs: Callable[[Logprobs], float]
    of_text: Callable[[str], float | None]
    of_texts: Callable[[Sequence[float]], float]
    reasons: bool = False
    clamp: tuple[float, float] = (0.0, 1.0)  # default of `label.clamp`

    @property
    def compares(self) -> bool:
        """Whether a call shows both responses; else it grades one."""
        return len(self.orders[0]) == 2

    def schema(self) -> dict[str, Any]:
        """The JSON schema of an answer, for servers that enforce one. The verdict comes last, after
        the reasons."""
        verdict = {"verdict": {"type": "string", "enum": list(self.options)}}
        properties = {"reasoning": {"type": "string"}} | verdict if self.reasons else verdict
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }

    def harmless(self, text: str) -> str:
        """A judged text, with its own verdict lines broken up so that they are not read as the
        judge's."""
        return _VERDICT.sub(lambda match: match[0][0] + " " + match[0][1:], text)

    def read(self, answer: Answer, structured: bool = False) -> tuple[float | None, str | None]:
        """(the number of an answer, fault): one of the two is None.

        Several samples give the mean over those with a verdict. If one of them has no
        log-probabilities, all are read as texts: a certain 1 would outweigh the soft numbers.
        """
        if answer.fault:
            return None, answer.fault
        logprobs = [answer.logprobs] if answer.logprobs is not None else list(answer.ends)
        if not all(math.isfinite(value) for one in logprobs if one for value in one.values()):
            return None, "malformed"
        if answer.logprobs is not None:
            return self.of_logprobs(answer.logprobs), None
        numbers = [self._of_sample(text, structured) for text in answer.texts]
        logprobs += [None] * (len(numbers) - len(logprobs))
        samples = [
            sample for sample in zip(logprobs, numbers, strict=True) if sample != (None, None)
        ]
        if not samples:
            return None, _why_unparsed(answer)
        if all(one is not None for one, _ in samples):
            return fmean(self.of_logprobs(one) for one, _ in samples if one is not None), None
        # A text without a verdict was led to it: its likelier option is the verdict.
        return self.of_texts(
            [self.of_text(max(one, key=one.get)) if n is None else n for one, n in samples]
        ), None

    def _of_sample(self, text: str, structured: bool) -> float | None:
        if not structured:
            return self.of_text(text)
        stated = verdict_in_json(text, self.options)
        return None if stated is None else self.of_text(self.options[stated.option])


def _odds(options: tuple[str, str]) -> Callable[[Logprobs], float]:
    first, second = options
    return lambda logprobs: probability(logprobs[first] - logprobs[second])


def _choice(options: tuple[str, str]) -> Callable[[str], float | None]:
    def of_text(text: str) -> float | None:
        choice = parse_choice(text, options)
        return None if choice is None else float(1 - choice)

    return of_text


def _counted(values: Sequence[float]) -> float:
    """k of n by the Krichevsky-Trofimov estimate: one hard answer gives 0.75, not certainty."""
    return (sum(values) + 0.5) / (len(values) + 1)


def _stated(text: str) -> float | None:
    stated = parse_verdict(text, AB)
    return None if stated is None else float(1 - stated.option)


LOWEST, HIGHEST = 1, 10


def _share(rating: float) -> float:
    """A rating as a share of the scale, at the middle of its tenth: 1 is 0.05 and 10 is 0.95, so
    no response is infinitely better than another."""
    p = (rating - LOWEST + 0.5) / (HIGHEST - LOWEST + 1)
    return 1 - (1 - p)  # flipped twice it is the same to the bit, as in `odds.probability`


def _expected(logprobs: Logprobs) -> float:
    """The expected rating over the options with a probability, as a share of the scale."""
    top = max(logprobs.values())
    weights = {int(option): math.exp(value - top) for option, value in logprobs.items()}
    return _share(sum(n * w for n, w in weights.items()) / math.fsum(weights.values()))


def _rated(text: str) -> float | None:
    rating = parse_rating(text, LOWEST, HIGHEST)
    return None if rating is None else _share(rating)


_PAIRWISE = Protocol(
    options=AB,
    orders=("ab", "ba"),
    tokens=1,
    tokens_of_text=16,
    of_logprobs=_odds(AB),
    of_text=_choice(AB),
    of_texts=_counted,
)
_POINTWISE = replace(
    _PAIRWISE,
    options=YES_NO,
    orders=("a", "b"),
    of_logprobs=_odds(YES_NO),
    of_text=_choice(YES_NO),
)
PROTOCOLS = {
    "pairwise": _PAIRWISE,
    # Reasons make a model too certain. Bai et al. 2022 (2212.08073, section 4.1): labels clamped
    # to 40-60 per cent trained better and more robustly.
    "reasoned": replace(
        _PAIRWISE,
        tokens=512,
        tokens_of_text=512,
        of_text=_stated,
        reasons=True,
        clamp=(0.4, 0.6),
    ),
    "pointwise": _POINTWISE,
    "rating": replace(
        _POINTWISE,
        options=tuple(str(n) for n in range(LOWEST, HIGHEST + 1)),
        tokens=SPELLED_TOKENS,
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
