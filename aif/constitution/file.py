"""A constitution: the TOML file with the principles that a judge applies.

    name = "warm"
    preamble = "..."                 # read before everything else
    principles = "all"               # or "sample": one principle a comparison, drawn by weight
    combine = "mean-logit"           # or "veto", "lexicographic"

    [[principle]]
    id = "kindness"
    weight = 1.0
    compare = "Which response is kinder to the person?"
    grade = "Is the response kind to the person?"

`load` checks the whole file; an error names file, key, got and expected.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from aif.config.toml import Strict, checked, read_toml
from aif.config.versions import for_digest
from aif.errors import InputError, shown
from aif.store.records import content_id

MAX_TEXT = 8_000  # characters in any one text
MAX_PRINCIPLES = 200
MAX_EXAMPLES = 64
TABLE = "constitution"  # before a key of this file in config/versions

# protocol of a judge -> the question of a principle that it asks
QUESTION = {"pairwise": "compare", "reasoned": "compare", "pointwise": "grade", "rating": "grade"}


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("a text that is not empty")
    return text.strip()


Text = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(_not_blank)]
Cue = Annotated[str, Field(max_length=64), AfterValidator(_not_blank)]


class Example(Strict):
    """A graded response, as an example before the judge's own task."""

    prompt: Text | None = None
    text: Text
    verdict: bool


class Revised(Strict):
    """A critique and a revision, as an example before the reviser's own task."""

    prompt: Text
    response: Text
    critique: Text
    revision: Text


class Principle(Strict):
    """One principle: how to critique and revise by it, and the questions for judges."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")
    weight: float = Field(1.0, gt=0, le=1e6, allow_inf_nan=False)
    critique: Text | None = None
    revision: Text | None = None
    compare: Text | None = None
    grade: Text | None = None
    cue: Cue | None = None  # in plain text it stands before Yes or No; default: the question
    example: list[Example] = Field([], max_length=MAX_EXAMPLES)
    revised: list[Revised] = Field([], max_length=MAX_EXAMPLES)

    def question(self, protocol: str) -> str:
        """The question that a protocol asks. Call `Constitution.require` first: "" means none."""
        return getattr(self, QUESTION.get(protocol, "grade")) or ""

    def digest(self, protocol: str, form: str) -> str:
        """A digest of all that a verdict under this principle depends on."""
        if QUESTION[protocol] == "compare":
            return content_id(self.compare)
        examples = [for_digest(one, f"{TABLE}.principle.example") for one in self.example]
        if form == "text" and self.cue:  # the cue replaces the question
            return content_id("cue", self.cue, examples)
        return content_id(self.grade, examples)


class Constitution(Strict):
    """The whole file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    description: str = Field("", max_length=MAX_TEXT)
    preamble: str = Field("", max_length=MAX_TEXT)
    principles: Literal["all", "sample"] = "all"
    combine: Literal["mean-logit", "veto", "lexicographic"] = "mean-logit"
    veto: float = Field(0.1, gt=0, lt=0.5)
    margin: float = Field(0.1, ge=0, lt=0.5)
    principle: list[Principle] = Field(min_length=1, max_length=MAX_PRINCIPLES)

    @field_validator("principle")
    @classmethod
    def _ids_differ(cls, principles: list[Principle]) -> list[Principle]:
        for name, times in Counter(principle.id for principle in principles).items():
            if times > 1:
                raise ValueError(f"ids that differ ({name!r} stands {times} times)")
        return principles

    def drawn(self, principles: Sequence[Principle], *draw: object) -> list[Principle]:
        """`principles` in a random order, drawn by weight without replacement.

        Each principle has an exponential clock, seeded by `draw` and its id; the first to ring is
        the first in order. So a change of one principle never changes the order of two others.
        """

        def arrival(principle: Principle) -> float:
            digest = content_id("draw", *draw, principle.id)
            return -math.log((int(digest[:13], 16) + 0.5) / 16**13) / principle.weight

        return sorted(principles, key=arrival)

    def require(self, protocol: str, where: object) -> None:
        """Raise InputError unless every principle has the question that `protocol` asks."""
        key = QUESTION[protocol]
        for number, principle in enumerate(self.principle):
            if not principle.question(protocol):
                raise InputError(
                    where,
                    f"principle.{number}.{key}",
                    got="nothing",
                    expected=f"a question, as the {protocol} protocol asks it of {principle.id!r}",
                )

    def lint(self) -> list[str]:
        """Notes on what is valid but probably a mistake, one line each."""
        notes = []
        for principle in self.principle:
            for key in ("compare", "grade"):
                text = getattr(principle, key)
                if text and "?" not in text:
                    notes.append(f"{principle.id}.{key}: asks no question")
            if not principle.compare and not principle.grade:
                notes.append(f"{principle.id}: neither compare nor grade, so it cannot be judged")
            if bool(principle.critique) != bool(principle.revision):
                notes.append(f"{principle.id}: only one of critique and revision")
            yes = sum(example.verdict for example in principle.example)
            if principle.example and not 0.25 <= yes / len(principle.example) <= 0.75:
                notes.append(
                    f"{principle.id}.example: {yes} of {len(principle.example)} say yes; a small "
                    "judge leans to the answer it sees most"
                )
        questions = [p.compare or p.grade for p in self.principle]
        if len(set(questions)) < len(questions):
            notes.append("two principles ask the same question")
        unused = {"veto": self.combine != "veto", "margin": self.combine != "lexicographic"}
        for key in self.model_fields_set & {key for key, idle in unused.items() if idle}:
            notes.append(f"{key}: has no effect with combine = {self.combine!r}")
        return notes

    def digest(self) -> str:
        """A digest of the whole constitution."""
        return content_id(for_digest(self, TABLE))


def load(path: Path) -> Constitution:
    """Read and check a constitution. Raises InputError, one line."""
    data = read_toml(path)
    if not data.get("principle"):
        got = shown(data["principle"]) if "principle" in data else "nothing"
        raise InputError(path, "principle", got=got, expected="[[principle]] tables")
    return checked(Constitution, data, path)
