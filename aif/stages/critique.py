"""A reviser: the calls for critiques and revisions, and how their answers are read.

Constitutional AI (Bai et al. 2022, 2212.08073, section 3): a model critiques a response by one
principle and then rewrites it to meet the critique; this repeats, with one principle per round.
Both steps see the conversation so far and the principle's worked examples.

    system, [example: request a critique -> critique, request a revision -> revision] ...,
    request a critique -> CRITIQUE, request a revision -> REVISION

The id of a call is a digest of all its text. So a call is made again if, and only if, its text
changed: a principle, an example, the template or an earlier round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from aif.config.settings import LLMSettings, ReviseSettings
from aif.config.templates import Template, neutralised
from aif.constitution.file import Constitution, Principle
from aif.errors import InputError
from aif.llm import Answer, Ask
from aif.llm.verdict_text import is_refusal
from aif.store.records import SERVICE_FAULTS, Message, content_id

END = "\n###"  # ends an example in the plain-text template, so the model ends its answer with it
# Faults of the call, not of the text in its answer: the call is made again by the next run.
RETRIED = SERVICE_FAULTS | {"malformed", "wrong_model", "rejected", "too_long"}


class Reviser:
    """A constitution and a model's settings: the calls of a round, and what their answers say.

    Only principles with `critique` and `revision` count; the others are for judges. Raises
    InputError (naming `where`) if a principle has one of the two, or if none counts.
    """

    def __init__(
        self,
        constitution: Constitution,
        model: LLMSettings,
        settings: ReviseSettings,
        where: object,
        control_tokens: Sequence[str] = (),
    ):
        self.constitution = constitution
        self.principles = _principles(constitution, where)
        self.model = model
        self._identity = model.identity()
        self.settings = settings
        self.is_chat = model.shown_form == "chat"
        self.template = (
            Template.load(Path(settings.template))
            if settings.template
            else Template.named("revise.chat" if self.is_chat else "revise.text")
        )
        self.template.require("critique", "revision")
        self._control_tokens = tuple(control_tokens)
        self._examples = [e.revision for p in self.principles for e in p.revised]

    def principle(self, response_id: str, round: int) -> Principle:
        """The principle of a response's round (from 1): all in random order, then all again."""
        cycle, place = divmod(round - 1, len(self.principles))
        drawn = self.constitution.drawn(self.principles, self.settings.seed, response_id, cycle)
        return drawn[place]

    def ask_critique(self, prompt: list[Message], text: str, principle: Principle) -> Ask:
        """The call that critiques `text` as a response to `prompt`."""
        heading, colon, _ = self._block(
            "revision", self._variables(prompt, text, principle) | {"critique": ""}
        ).partition(":")
        # After its critique a base model would go on with the next part of the examples.
        stop = (END, f"\n{heading.strip()}{colon}") if colon else (END,)
        return self._ask(self._turns(prompt, text, principle), stop)

    def ask_revision(
        self, prompt: list[Message], text: str, principle: Principle, critique: str
    ) -> Ask:
        """The call that rewrites `text` to meet its critique."""
        turns = self._turns(prompt, text, principle)
        critique = self._harmless(critique)
        variables = self._variables(prompt, text, principle) | {"critique": critique}
        return self._ask([*turns, critique, self._block("revision", variables)], (END,))

    def _turns(self, prompt: list[Message], text: str, principle: Principle) -> list[str]:
        """Requests and answers in turn: the examples, then the request for a critique."""
        turns = []
        for example in principle.revised:
            question = [{"role": "user", "content": example.prompt}]
            variables = self._variables(question, example.response, principle)
            turns += [self._block("critique", variables), example.critique]
            variables["critique"] = example.critique
            turns += [self._block("revision", variables), example.revision]
        return [*turns, self._block("critique", self._variables(prompt, text, principle))]

    def _variables(self, prompt: list[Message], text: str, principle: Principle) -> dict[str, Any]:
        return {
            "prompt": [
                {"role": message["role"], "content": self._harmless(message["content"])}
                for message in prompt
            ],
            "response": self._harmless(text),
            "critique_request": principle.critique,
            "revision_request": principle.revision,
        }

    def _harmless(self, text: str) -> str:
        return neutralised(text, self._control_tokens)

    def _block(self, name: str, variables: dict[str, Any]) -> str:
        return self.template.block(name, variables)

    def _ask(self, turns: list[str], stop: tuple[str, ...]) -> Ask:
        messages = text = None
        if self.is_chat:
            system = self._block("system", {}) if self.template.has("system") else ""
            messages = [{"role": "system", "content": system}] if system else []
            messages += [
                {"role": "assistant" if number % 2 else "user", "content": turn}
                for number, turn in enumerate(turns)
            ]
        else:
            text = _as_text(turns)
        key = content_id("revise", messages, text, self._identity, self.settings.seed)
        return Ask(
            key=key,
            messages=messages,
            text=text,
            max_tokens=self.model.response_tokens,
            temperature=self.model.temperature,
            seed=int(key[:8], 16),
            stop=() if self.is_chat else stop,
        )

    def journal_row(self, answer: Answer) -> dict[str, Any]:
        """The journal row of an answer. It has a fault only if the call failed and must be made
        again; a bad text is no fault here."""
        return {
            "id": answer.key,
            "fault": answer.fault if answer.fault in RETRIED else None,
            "text": answer.texts[0] if answer.texts else "",
            "finish": "refused" if answer.fault == "refused" else answer.finish,
            "detail": answer.detail,
            "usage": answer.usage,
        }

    def critique(self, row: dict[str, Any]) -> tuple[str, str | None]:
        """(text, fault) of a critique's journal row. A truncated critique has no fault."""
        text = row["text"].strip()
        return text, _fault(row, text)

    def revision(self, row: dict[str, Any], before: str) -> tuple[str, str | None]:
        """(text, fault) of a revision of `before`: empty, refused, truncated, unchanged, or copied
        word for word from a worked example, as small models often do."""
        text = row["text"].strip()
        fault = _fault(row, text)
        if fault == "refused" and text and self.settings.keep_refusals:
            fault = None
        if fault is None and row["finish"] == "length":
            fault = "truncated"
        if fault is None and _same(text, before):
            fault = "unchanged"
        if fault is None and any(_same(text, example) for example in self._examples):
            fault = "copied"
        return text, fault


def _principles(constitution: Constitution, where: object) -> list[Principle]:
    revising = []
    for number, principle in enumerate(constitution.principle):
        if bool(principle.critique) != bool(principle.revision):
            raise InputError(
                where,
                f"principle.{number}.{'revision' if principle.critique else 'critique'}",
                got="nothing",
                expected=f"an instruction, as {principle.id!r} has the other half",
            )
        if principle.critique:
            revising.append(principle)
    if not revising:
        raise InputError(
            where, "principle", got="none to revise by", expected="one with critique and revision"
        )
    return revising


def _as_text(turns: Iterable[str]) -> str:
    """Requests and answers as one text. The answer to a revision request ends an example."""
    parts = []
    for number, turn in enumerate(turns):
        parts.append(turn.strip() if number % 2 == 0 else f" {turn.strip()}")
        if number % 2:
            parts.append(f"{END}\n" if number % 4 == 3 else "\n")
    return "".join(parts)


def _fault(row: dict[str, Any], text: str) -> str | None:
    if row["finish"] == "refused" or is_refusal(text):
        return "refused"
    return None if text else "empty"


def _same(text: str, other: str) -> bool:
    """Whether two texts differ only in spaces and case."""
    return text.casefold().split() == other.casefold().split()
