"""The rows of a run folder's JSONL files, and the ids that are computed from their contents.

An id is the sha256 of the canonical JSON of everything the row depends on, so it can be derived
again from the row: "what is missing" is a set difference, and an edited input simply has a new id.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from typing import Any

Message = dict[str, str]  # {"role": "user", "content": "..."}, as every chat API has it
_SWAPPED = str.maketrans("ab", "ba")

# Why a row has no answer. No number ever stands for one of these.
FAULTS = {
    "unparsed": "the text holds no verdict or answer",
    "refused": "the model declined to answer",
    "truncated": "the text was cut off before the verdict",
    "empty": "the model said nothing",
    "tied": "no answer has more votes than every other",
    "unsure": "the answer with most votes has too small a share of them",
    "no_consensus": "the judges do not all name the same winner",
    "unchanged": "the revision is the text that it was to revise",
    "copied": "the revision is that of a worked example",
    "identical": "both responses are the same text, so there is nothing to compare",
    "too_long": "the text does not fit the model's context",
    "rejected": "the server refused this request",
    "malformed": "the server's answer is not a completion",
    "wrong_model": "another model answered than the one asked",
    "rate_limited": "the server kept asking to wait",
    "timeout": "no answer in time",
    "backend": "the server failed or could not be reached",
}

# Faults of the service rather than of the row: a long unbroken series means that it is gone.
SERVICE_FAULTS = frozenset({"backend", "timeout", "rate_limited"})


LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which UTF-8 cannot carry

# ASCII, so that any text goes, lone surrogates too. One encoder: json.dumps would build one a call.
_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def content_id(*parts: object) -> str:
    """The sha256 (64 hex digits) of the canonical JSON of `parts`."""
    return hashlib.sha256(_canonical(parts).encode("ascii")).hexdigest()


def as_row(record: Any) -> dict[str, Any]:
    """A record as the object that stands on its line. (`asdict` would copy every text.)"""
    row = {name: getattr(record, name) for name in record.__slots__}
    if not row.get("by_judge", True):  # said only where it says something
        del row["by_judge"]
    return row


def other(p: float | None) -> float | None:
    """A probability seen from the other response; null stays null."""
    return None if p is None else 1 - p


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation that ends where a response is due."""

    id: str
    messages: list[Message]
    source: str = ""  # the row's own id in the file it came from, if it has one

    @classmethod
    def of(cls, messages: list[Message], source: str = "") -> Prompt:
        return cls(content_id("prompt", messages), messages, source)


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled continuation of a prompt; `text` is null with a `fault`."""

    id: str
    prompt_id: str
    policy: str
    sample: int
    text: str | None
    finish: str | None
    fault: str | None
    usage: dict[str, int]


@dataclass(frozen=True, slots=True)
class Revision:
    """One round of critique and revision of one response.

    `revision` is null with a `fault`; the next round then goes on from the text before. `id` is
    that of the call which wrote the revision, or of the round's critique where that one failed.
    """

    id: str
    response_id: str
    prompt_id: str
    round: int  # from 1
    principle_id: str
    reviser: str
    critique: str | None
    revision: str | None
    fault: str | None
    usage: dict[str, int]


@dataclass(frozen=True, slots=True)
class Kept:
    """What the judge says of a revision against the response that it came from."""

    revision_id: str
    response_id: str
    round: int
    comparison_id: str
    p_revision: float | None
    by_principle: dict[str, float | None]  # the same under each principle alone
    fault: str | None
    kept: bool


@dataclass(frozen=True, slots=True)
class Vote:
    """The answer that most of a prompt's responses end in; null with a `fault`."""

    prompt_id: str
    answer: str | None
    fault: str | None
    share: float  # of all responses
    responses: int
    answered: int
    response_ids: list[str]  # of responses with the voted answer, distinct texts


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two responses to one prompt. Nothing in it says which one a human preferred."""

    id: str
    prompt_id: str
    prompt: list[Message]
    first: str
    second: str

    @classmethod
    def of(cls, prompt: list[Message], first: str, second: str) -> Comparison:
        return cls(
            content_id("comparison", prompt, first, second),
            content_id("prompt", prompt),
            prompt,
            first,
            second,
        )

    def swapped(self) -> Comparison:
        """The comparison with the other response first."""
        return Comparison.of(self.prompt, self.second, self.first)


@dataclass(frozen=True, slots=True)
class HumanChoice:
    """What a person (or the data set) preferred; kept apart from what the judge may see."""

    comparison_id: str
    p_first: float  # 1.0: the first, 0.0: the second
    source: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One paid call as it bears on one comparison.

    `p_first` is how far this call alone speaks for the first response, in [0, 1], or null with a
    `fault`. `order` is "ab" or "ba" for a pairwise call (which response stood first), "a" or "b"
    for a grade (which response was graded). A grade that several comparisons share has one id and
    was paid once.
    """

    id: str
    comparison_id: str
    principle_id: str
    order: str
    judge: str
    text: str | None
    p_first: float | None
    fault: str | None
    usage: dict[str, int]

    def swapped(self) -> Verdict:
        """The verdict with the other response first. `comparison_id` stays."""
        order = self.order.translate(_SWAPPED)
        return replace(self, order=order, p_first=other(self.p_first))


@dataclass(frozen=True, slots=True)
class Label:
    """An aggregate over the verdicts of one comparison. It is made from them alone and costs no
    call."""

    comparison_id: str
    p_first: float | None
    fault: str | None
    n_verdicts: int  # verdicts that count; those with a fault do not
    order_agreement: float | None  # share of principles whose two orders name the same winner
    by_principle: dict[str, float | None] = field(default_factory=dict)
    by_judge: dict[str, float | None] = field(default_factory=dict)  # {} where there is one alone

    @classmethod
    def null(cls, comparison_id: str, fault: str) -> Label:
        """A label without a number."""
        return cls(comparison_id, None, fault, 0, None)

    def swapped(self) -> Label:
        """The label with the other response first. `comparison_id` stays."""
        return replace(
            self,
            p_first=other(self.p_first),
            by_principle={name: other(p) for name, p in self.by_principle.items()},
            by_judge={name: other(p) for name, p in self.by_judge.items()},
        )
