"""A judge: which calls a comparison needs under a constitution, and what an answer says.

How a call asks and what its answer says is its protocol's: pairwise, reasoned, pointwise or rating
(`aif.judge.protocols`). A cell is one such call: comparison x principle x order. Its id is computed
from all that its answer depends on, so a cell is done when the journal holds that id, whoever asked
and when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aif.config.settings import BUNDLED, LabelSettings, LLMSettings
from aif.config.templates import Template, neutralised
from aif.constitution.file import Constitution, Principle
from aif.errors import InputError
from aif.judge.protocols import LEAD, PROTOCOLS, STRUCTURED_TOKENS
from aif.llm import Answer, Ask
from aif.store.records import Comparison, Verdict, content_id

ORDERS = {name: protocol.orders for name, protocol in PROTOCOLS.items()}


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
        self._how = PROTOCOLS[self.protocol]
        self.options = self._how.options
        self.orders = self._how.orders
        self.clamp = label.clamp or self._how.clamp
        _require_reachable(constitution, self.clamp)
        if model.structured:
            _require_structured(model, self.template)
        self._control_tokens = tuple(control_tokens)
        self.question_ids = {p.id: self._question_id(p) for p in constitution.principle}

    @property
    def grades(self) -> bool:
        """Whether a call grades one response rather than compares two."""
        return not self._how.compares

    @property
    def max_tokens(self) -> int:
        """Tokens that one answer may take."""
        model, how = self.model, self._how
        needed = how.tokens if model.logprobs else how.tokens_of_text
        if model.structured:
            needed = max(needed, STRUCTURED_TOKENS)
        return model.max_tokens or needed

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
        names = ("first", "second") if self._how.compares else ("response",)
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
            max_tokens=self.max_tokens,
            temperature=self.model.temperature,
            samples=self.model.samples,
            seed=int(cell.id[:8], 16),
            # What is carried on as a text would go on behind its verdict, with one more example.
            stop=("\n\n",) if self._how.reasons and not chat else (),
            lead=LEAD if self._how.reasons else "",
            schema=self._how.schema() if self.model.structured else None,
        )

    def _harmless(self, text: str) -> str:
        text = neutralised(text, self._control_tokens)
        return self._how.harmless(text) if self._how.reasons else text

    def read(self, answer: Answer) -> tuple[float | None, str | None]:
        """(probability of the first option, or rating as a share of the scale; fault): one of the
        two is None. `label.clamp` holds the number within bounds."""
        said, fault = self._how.read(answer, self.model.structured)
        if said is None:
            return None, fault
        low, high = self.clamp
        return min(high, max(low, said)), None

    def journal_row(self, answer: Answer) -> dict[str, Any]:
        """What is kept of an answer: raw text, log-probabilities, and the fault if it has one."""
        _, fault = self.read(answer)
        logprobs = answer.logprobs or (list(answer.ends) if any(answer.ends) else None)
        return {
            "id": answer.key,
            "fault": fault,
            "texts": list(answer.texts),
            "finish": answer.finish,
            "logprobs": None if fault else logprobs,  # JSON has no NaN
            "detail": answer.detail,
            "usage": answer.usage,
        }

    def verdict(self, cell: Cell, comparison: Comparison, row: dict[str, Any]) -> Verdict:
        """A journal row as it bears on a comparison."""
        found = row["logprobs"]
        answer = Answer(
            key=row["id"],
            texts=tuple(row["texts"]),
            finish=row["finish"],
            logprobs=found if isinstance(found, dict) else None,
            fault=row["fault"],
            ends=tuple(found) if isinstance(found, list) else (),
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
    """(protocol, form), where "auto" means what the model can do: see `aif.judge.protocols`."""
    small = model.weights == BUNDLED
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


def _require_reachable(constitution: Constitution, clamp: Sequence[float]) -> None:
    """Raise InputError where verdicts are held within bounds that a rule of the constitution, which
    acts beyond them, can never see."""
    acts = {"veto": 1 - constitution.veto, "lexicographic": 0.5 + constitution.margin}
    needed = acts.get(constitution.combine, 0.5)
    if max(clamp[1], 1 - clamp[0]) < needed - 1e-9:
        raise InputError(
            "label",
            "clamp",
            got=list(clamp),
            expected=f'bounds that reach {needed:g}, where "{constitution.combine}" of the '
            "constitution acts; [0, 1] leaves verdicts as they are",
        )


def _require_structured(model: LLMSettings, template: Template) -> None:
    """Raise InputError for a judge that cannot be held to a JSON schema."""
    can = model.model.startswith(("openai:", "openai-batch:", "vllm:"))
    if not can or not template.is_chat:
        how = "in plain text" if can else f"for {model.model}"
        raise InputError(
            "judge",
            "structured",
            got=f"true {how}",
            expected="an openai: or vllm: judge, asked by chat",
        )
