"""A judge: which calls a comparison needs under a constitution, and what an answer says.

`pairwise` shows both responses, in both orders: position bias is the norm in LLM judges (Zheng et
al. 2023, 2306.05685; Lee et al. 2023, 2309.00267), and half the difference of the two log-odds
cancels what is constant in it. `pointwise` grades each response alone, few-shot examples first, and
compares the grades' log-odds; a very small model can judge in this way and in no other.

A cell is one such call: comparison x principle x order. Its id is computed from all that its answer
depends on, so a cell is done when the journal holds that id, whoever asked and when.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aif.constitution import Constitution, Principle
from aif.llm import Answer, Ask
from aif.odds import probability
from aif.parse import is_refusal, parse_choice
from aif.records import Comparison, Verdict, content_id
from aif.settings import BUNDLED, LabelSettings, LLMSettings
from aif.templates import Template, neutralised

OPTIONS = {"pairwise": ("A", "B"), "pointwise": ("Yes", "No")}
ORDERS = {"pairwise": ("ab", "ba"), "pointwise": ("a", "b")}


@dataclass(frozen=True, slots=True)
class Cell:
    """One call that a comparison needs."""

    id: str
    principle: Principle
    order: str


class Judge:
    """A constitution, a protocol and a model's settings, ready to say what to ask.

    `control_tokens` are the model's exact special tokens, where they are known.
    """

    def __init__(
        self,
        constitution: Constitution,
        model: LLMSettings,
        label: LabelSettings,
        control_tokens: Sequence[str] = (),
    ):
        self.constitution = constitution
        self.model = model
        self.protocol, self.form = resolved(model, label)
        self.seed = label.seed
        self.template = (
            Template.load(Path(label.template))
            if label.template
            else Template.named(f"{self.protocol}.{self.form}")
        )
        self.options = OPTIONS[self.protocol]
        self.orders = ORDERS[self.protocol]
        self._control_tokens = tuple(control_tokens)
        self.question_ids = {p.id: self._question_id(p) for p in constitution.principle}

    def _question_id(self, principle: Principle) -> str:
        """The id of what every cell of a principle has in common."""
        return content_id(
            "question",
            self.protocol,
            self.template.text,
            self.constitution.preamble,
            principle.digest(self.protocol, self.form),
            self.model.identity(),
        )

    def principles_for(self, comparison: Comparison) -> list[Principle]:
        """All of them, or the one that is drawn for this comparison, by weight."""
        every = self.constitution.principle
        if self.constitution.principles == "all":
            return every
        return self.constitution.drawn(every, self.seed, comparison.id)[:1]

    def cells(self, comparison: Comparison) -> list[Cell]:
        """The calls that a comparison needs; none when its two responses are the same text."""
        if comparison.first == comparison.second:
            return []
        shown = [
            (order, content_id("shown", comparison.prompt_id, *texts_in_order(comparison, order)))
            for order in self.orders
        ]
        return [
            Cell(content_id("cell", self.question_ids[principle.id], shown_id), principle, order)
            for principle in self.principles_for(comparison)
            for order, shown_id in shown
        ]

    def ask(self, cell: Cell, comparison: Comparison) -> Ask:
        """The call for a cell, with the judged text made harmless."""
        texts = [self._harmless(text) for text in texts_in_order(comparison, cell.order)]
        names = ("first", "second") if self.protocol == "pairwise" else ("response",)
        variables: dict[str, Any] = dict(zip(names, texts, strict=True)) | {
            "preamble": self.constitution.preamble,
            "question": cell.principle.question(self.protocol),
            "cue": cell.principle.cue,
            "examples": cell.principle.example,
            "delimiter": delimiter(comparison, cell.order),
            "prompt": [
                {"role": message["role"], "content": self._harmless(message["content"])}
                for message in comparison.prompt
            ],
        }
        chat = self.template.is_chat
        return Ask(
            key=cell.id,
            messages=self.template.chat(variables) if chat else None,
            text=None if chat else self.template.plain(variables),
            options=self.options,
            max_tokens=self.model.verdict_tokens,
            temperature=self.model.temperature,
            samples=self.model.samples,
            seed=int(cell.id[:8], 16),
        )

    def _harmless(self, text: str) -> str:
        return neutralised(text, self._control_tokens)

    def read(self, answer: Answer) -> tuple[float | None, str | None]:
        """(probability of the first option, fault): one of the two is None."""
        if answer.fault:
            return None, answer.fault
        if answer.logprobs is not None:
            first, second = (answer.logprobs[option] for option in self.options)
            if not (math.isfinite(first) and math.isfinite(second)):
                return None, "malformed"
            return probability(first - second), None
        choices = [parse_choice(text, self.options) for text in answer.texts]
        parsed = [choice for choice in choices if choice is not None]
        if not parsed:
            return None, _why_unparsed(answer)
        # k of n samples: the Krichevsky-Trofimov estimate, so that one hard answer says 0.75
        # rather than a certainty that it has not earned.
        return (parsed.count(0) + 0.5) / (len(parsed) + 1), None

    def journal_row(self, answer: Answer) -> dict[str, Any]:
        """What is kept of an answer: raw text, log-probabilities, and the fault if it has one."""
        _, fault = self.read(answer)
        return {
            "id": answer.key,
            "fault": fault,
            "texts": list(answer.texts),
            "finish": answer.finish,
            "logprobs": None if fault else answer.logprobs,  # JSON has no NaN
            "detail": answer.detail,
            "usage": answer.usage,
        }

    def verdict(self, cell: Cell, comparison: Comparison, row: dict[str, Any]) -> Verdict:
        """A journal row as it bears on a comparison."""
        answer = Answer(
            key=row["id"],
            texts=tuple(row["texts"]),
            finish=row["finish"],
            logprobs=row["logprobs"],
            fault=row["fault"],
        )
        p_option, fault = self.read(answer)
        flipped = cell.order in ("ba", "b")
        return Verdict(
            id=cell.id,
            comparison_id=comparison.id,
            principle_id=cell.principle.id,
            order=cell.order,
            judge=self.model.model,
            text="\n".join(answer.texts) if answer.texts else None,
            p_first=1 - p_option if flipped and p_option is not None else p_option,
            fault=fault,
            usage=row["usage"],
        )


def resolved(model: LLMSettings, label: LabelSettings) -> tuple[str, str]:
    """(protocol, form), where "auto" means what the model can do: see the module docstring."""
    small = model.model == BUNDLED
    protocol = label.protocol if label.protocol != "auto" else "pointwise" if small else "pairwise"
    return protocol, model.shown_form


def texts_in_order(comparison: Comparison, order: str) -> tuple[str, ...]:
    """What a call of this order shows: both responses as "ab" or "ba", or one as "a" or "b"."""
    return tuple(comparison.first if which == "a" else comparison.second for which in order)


def delimiter(comparison: Comparison, order: str) -> str:
    """A marker that the text which a call shows cannot contain, since it is a digest of that text.

    A response that wants to fake the end of its own section would have to know it beforehand.
    """
    texts = sorted(texts_in_order(comparison, order))
    return content_id("delimiter", comparison.prompt_id, texts)[:12]


def _why_unparsed(answer: Answer) -> str:
    if any(is_refusal(text) for text in answer.texts):
        return "refused"
    if not any(text.strip() for text in answer.texts):
        return "empty"
    return "truncated" if answer.finish == "length" else "unparsed"
