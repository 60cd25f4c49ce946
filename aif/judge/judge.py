"""A judge: which calls a comparison needs under a constitution, and what an answer says.

A protocol (`aif.judge.protocols`) says how to ask and how to read the answer. A call is one
comparison x principle x order. Its id is a digest of everything that its answer depends on, so a
call is done when the journal has its id, no matter which command paid for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aif.config.settings import BUNDLED, LabelSettings, LLMSettings
from aif.config.templates import Template, neutralised
from aif.constitution.file import Constitution, Principle
from aif.errors import InputError
from aif.judge.protocols import LEAD, PROTOCOLS, STRUCTURED_TOKENS
from aif.llm import Answer, Ask
from aif.store.journal import Reader
from aif.store.records import Comparison, Verdict, content_id, other

PaidVerdict = tuple[Verdict, dict[str, Any]]  # a verdict with its journal row


@dataclass(frozen=True, slots=True)
class JudgeCall:
    """One call that a comparison needs."""

    id: str
    principle: Principle
    order: str

    @property
    def digest(self) -> bytes:
        """The id as 32 bytes, as a journal's index has it."""
        return bytes.fromhex(self.id)


class Judge:
    """A model, a constitution and a protocol: which calls a comparison needs, what they ask, and
    what an answer says.

    `name` is for verdicts and messages: the model, unless a panel needs to tell judges apart.
    """

    def __init__(
        self,
        constitution: Constitution,
        model: LLMSettings,
        label: LabelSettings,
        name: str = "",
    ):
        self.constitution = constitution
        self.model = model
        self.name = name or model.model
        self.protocol, self.form = protocol_of(model, label), model.shown_form
        self.seed = label.seed
        self.template = (
            Template.load(Path(label.template))
            if label.template
            else Template.named(f"{self.protocol}.{self.form}")
        )
        self._protocol = PROTOCOLS[self.protocol]
        self.options = self._protocol.options
        self.orders = self._protocol.orders
        self.compares = self._protocol.compares
        self.clamp = label.clamp or self._protocol.clamp
        _require_reachable(constitution, self.clamp)
        if model.structured:
            _require_structured(model, self.template)
        self.question_ids = {p.id: self._question_id(p) for p in constitution.principle}

    @property
    def max_tokens(self) -> int:
        """The most tokens that one answer may have."""
        model, protocol = self.model, self._protocol
        needed = protocol.tokens if model.logprobs else protocol.tokens_of_text
        if model.structured:
            needed = max(needed, STRUCTURED_TOKENS)
        return model.max_tokens or needed

    def _question_id(self, principle: Principle) -> str:
        """The id of what all calls of a principle have in common."""
        return content_id(
            "question",
            self.protocol,
            self.template.text,
            self.constitution.preamble,
            principle.digest(self.protocol, self.form),
            self.model.identity(),
        )

    def principles_for(self, comparison: Comparison) -> list[Principle]:
        """All principles, or the one that is drawn by weight for this comparison."""
        principles = self.constitution.principle
        if self.constitution.principles == "all":
            return principles
        return self.constitution.drawn(principles, self.seed, comparison.id)[:1]

    def calls_for(
        self, comparison: Comparison, orders: Sequence[str] | None = None
    ) -> list[JudgeCall]:
        """The calls that a comparison needs, in these orders or in all of the protocol's.

        There is none if its two responses are the same text.
        """
        if comparison.first == comparison.second:
            return []
        texts = [
            (order, content_id("shown", comparison.prompt_id, *texts_in_order(comparison, order)))
            for order in orders or self.orders
        ]
        return [
            JudgeCall(
                content_id("cell", self.question_ids[principle.id], texts_id), principle, order
            )
            for principle in self.principles_for(comparison)
            for order, texts_id in texts
        ]

    def one_order(self, comparison: Comparison) -> Sequence[str]:
        """One order of the two responses; all orders if the protocol grades each response alone.

        A digest of the two texts decides which response is shown first. So a position bias of the
        judge does not favour the first response, and the swapped pair has the same call.
        """
        if not self.compares:
            return self.orders
        texts = sorted((comparison.first, comparison.second))
        shown_first = texts[int(content_id("one order", comparison.prompt_id, *texts)[0], 16) % 2]
        return self.orders[:1] if shown_first == comparison.first else self.orders[1:]

    def asks(
        self,
        comparisons: Iterable[Comparison],
        missing: Iterable[bytes],
        control_tokens: Sequence[str] = (),
    ) -> Iterator[Ask]:
        """Each missing call once (`JudgeCall.digest`), made only when the caller takes it."""
        left = set(missing)
        for comparison in comparisons:
            for call in self.calls_for(comparison):
                if call.digest in left:
                    left.remove(call.digest)
                    yield self.ask(call, comparison, control_tokens)

    def ask(
        self, call: JudgeCall, comparison: Comparison, control_tokens: Sequence[str] = ()
    ) -> Ask:
        """What a call asks. The judged texts cannot pose as part of the prompt or as a verdict:
        `control_tokens`, the model's exact special tokens if they are known, are broken up."""

        def harmless(text: str) -> str:
            text = neutralised(text, control_tokens)
            return self._protocol.harmless(text) if self._protocol.reasons else text

        texts = [harmless(text) for text in texts_in_order(comparison, call.order)]
        names = ("first", "second") if self.compares else ("response",)
        variables: dict[str, Any] = dict(zip(names, texts, strict=True)) | {
            "preamble": self.constitution.preamble,
            "question": call.principle.question(self.protocol),
            "cue": call.principle.cue,
            "examples": call.principle.example,
            "delimiter": delimiter(comparison, call.order),
            "prompt": [
                {"role": message["role"], "content": harmless(message["content"])}
                for message in comparison.prompt
            ],
        }
        chat, reasons = self.template.is_chat, self._protocol.reasons
        return Ask(
            key=call.id,
            messages=self.template.chat(variables) if chat else None,
            text=None if chat else self.template.plain(variables),
            options=self.options,
            max_tokens=self.max_tokens,
            temperature=self.model.temperature,
            samples=self.model.samples,
            seed=int(call.id[:8], 16),
            # A base model would go on after its verdict and write one more example.
            stop=("\n\n",) if reasons and not chat else (),
            lead=LEAD if reasons else "",
            schema=self._protocol.schema() if self.model.structured else None,
        )

    def read(self, answer: Answer) -> tuple[float | None, str | None]:
        """(probability of the first option, or rating as a share of the scale; fault): one of the
        two is None. The number is within the bounds of `label.clamp`."""
        p, fault = self._protocol.read(answer, self.model.structured)
        if p is None:
            return None, fault
        low, high = self.clamp
        return min(high, max(low, p)), None

    def journal_row(self, answer: Answer) -> dict[str, Any]:
        """The journal row of an answer: raw texts, log-probabilities, and its fault if any."""
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

    def verdict(self, call: JudgeCall, comparison: Comparison, row: dict[str, Any]) -> Verdict:
        """The verdict on a comparison that a journal row holds."""
        logprobs = row["logprobs"]
        answer = Answer(
            key=row["id"],
            texts=tuple(row["texts"]),
            finish=row["finish"],
            logprobs=logprobs if isinstance(logprobs, dict) else None,
            fault=row["fault"],
            ends=tuple(logprobs) if isinstance(logprobs, list) else (),
        )
        p_option, fault = self.read(answer)
        flipped = call.order in ("ba", "b")
        return Verdict(
            id=call.id,
            comparison_id=comparison.id,
            principle_id=call.principle.id,
            order=call.order,
            judge=self.name,
            text="\n".join(answer.texts) if answer.texts else None,
            p_first=other(p_option) if flipped else p_option,
            fault=fault,
            usage=row["usage"],
        )

    def verdicts(
        self, calls: Iterable[JudgeCall], comparison: Comparison, journal: Reader
    ) -> list[PaidVerdict]:
        """The verdicts of those calls that were made, with or without an answer."""
        rows = ((call, journal.newest(call.id)) for call in calls)
        return [(self.verdict(call, comparison, row), row) for call, row in rows if row is not None]


def protocol_of(model: LLMSettings, label: LabelSettings) -> str:
    """`label.protocol`; "auto" means pointwise for the bundled model and pairwise for others."""
    if label.protocol != "auto":
        return label.protocol
    return "pointwise" if model.weights == BUNDLED else "pairwise"


def texts_in_order(comparison: Comparison, order: str) -> tuple[str, ...]:
    """The responses that a call shows: both for the order "ab" or "ba", one for "a" or "b"."""
    return tuple(comparison.first if which == "a" else comparison.second for which in order)


def delimiter(comparison: Comparison, order: str) -> str:
    """A marker that the shown text cannot contain, because it is a digest of that text.

    A response would have to contain its own digest to fake the end of its section.
    """
    texts = sorted(texts_in_order(comparison, order))
    return content_id("delimiter", comparison.prompt_id, texts)[:12]


def _require_reachable(constitution: Constitution, clamp: Sequence[float]) -> None:
    """Raise InputError if clamped verdicts can never reach the threshold of a rule of the
    constitution."""
    thresholds = {"veto": 1 - constitution.veto, "lexicographic": 0.5 + constitution.margin}
    needed = thresholds.get(constitution.combine, 0.5)
    if max(clamp[1], 1 - clamp[0]) < needed - 1e-9:
        raise InputError(
            "label",
            "clamp",
            got=list(clamp),
            expected=f'bounds that reach {needed:g}, where "{constitution.combine}" of the '
            "constitution acts; [0, 1] leaves verdicts as they are",
        )


def _require_structured(model: LLMSettings, template: Template) -> None:
    """Raise InputError if the judge's server cannot enforce a JSON schema."""
    can = model.model.startswith(("openai:", "openai-batch:", "vllm:"))
    if not can or not template.is_chat:
        how = "in plain text" if can else f"for {model.model}"
        raise InputError(
            "judge",
            "structured",
            got=f"true {how}",
            expected="an openai: or vllm: judge, asked by chat",
        )
