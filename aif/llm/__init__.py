"""A language model to ask: asks go in, answers come out in any order.

    with open_llm(settings) as llm:
        for answer in llm.answer(asks):
            ...

One protocol serves an HTTP server with hundreds of requests in flight, a local model that wants
large batches, and the scripted fake: each reads `asks` as fast as it can use them. To stop early,
end `asks`; the calls in flight are still answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

from aif.config.settings import BUNDLED, LLMSettings
from aif.dependencies import require
from aif.errors import InputError
from aif.store.records import Message


@dataclass(frozen=True, slots=True)
class Ask:
    """One call: a chat (`messages`) or a plain text to continue (`text`), never both.

    With `options`, the answer has the log-probability of each option as the very next token. A
    token counts for an option if the two differ only in case and surrounding spaces; options that
    begin alike, as 1 and 10, are read over several tokens.
    With `lead` ("Verdict:") the text gives reasons first and ends in the lead and an option; with
    `schema` it is JSON with the option as its "verdict". Then the log-probabilities are read there
    (`Answer.ends`).
    A text ends before the first of `stop` in it.
    """

    key: str
    messages: list[Message] | None = None
    text: str | None = None
    options: tuple[str, ...] = ()
    max_tokens: int = 1
    temperature: float = 0.0
    samples: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    # Called before a retry, if the last request may have been paid for.
    may_retry: Callable[[], bool] = field(default=lambda: True, compare=False)
    lead: str = ""
    schema: dict[str, Any] | None = None

    @property
    def reads_the_end(self) -> bool:
        """Whether the options are read at the verdict of the text, not at its first token."""
        return bool(self.options) and bool(self.lead or self.schema)

    @property
    def texts(self) -> list[str]:
        """The content of each message, or the one text."""
        if self.messages is None:
            return [self.text or ""]
        return [message["content"] for message in self.messages]

    def cut(self, text: str) -> str:
        """The part of a text before the first of `stop`."""
        return text[: min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=None)]


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to the ask with the same key.

    `logprobs` maps each option to its log-probability (nats, <= 0); it is None if the model gives
    none. If the ask reads the end, `ends` has such a mapping (or None) for each of `texts`. With a
    `fault` (see `records.FAULTS`) there is no answer, and `detail` says why.
    """

    key: str
    texts: tuple[str, ...] = ()
    finish: str | None = None
    logprobs: dict[str, float] | None = None
    fault: str | None = None
    detail: str = ""
    usage: dict[str, int] = field(default_factory=dict)  # prompt_tokens, completion_tokens
    unmetered: int = 0  # requests that may have been paid for, with unknown usage
    ends: tuple[dict[str, float] | None, ...] = ()

    def cut(self, ask: Ask) -> Answer:
        """This answer with its texts cut at the stop strings of the ask."""
        texts = tuple(map(ask.cut, self.texts))
        if texts == self.texts:
            return self
        cut_all = all(len(new) < len(old) for new, old in zip(texts, self.texts, strict=True))
        return replace(self, texts=texts, finish="stop" if cut_all else self.finish)


Note = Callable[[str], None]


def no_note(line: str) -> None:
    """Nobody reads how far a batch is."""


class LLM(AbstractContextManager["LLM"], Protocol):
    """A model to ask. Raises `JudgeStopped` when it cannot go on at all.

    `control_tokens` are the strings that its tokenizer reads as one special token, () if unknown.
    A model that works for long before the first answer calls `note` with how far it is.
    """

    control_tokens: tuple[str, ...] = ()
    note: Note = staticmethod(no_note)

    def answer(self, asks: Iterable[Ask]) -> Iterator[Answer]:
        """One answer for every ask, in any order, as soon as each is there."""

    def count_tokens(self, asks: Iterable[Ask]) -> tuple[int, bool]:
        """Prompt tokens of all asks together, and whether that is exact (or an estimate)."""

    def close(self) -> None:
        """Free what the model holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_llm(settings: LLMSettings) -> LLM:
    """The model that `settings.model` names.

    `openai:NAME` (any OpenAI-compatible server), `openai-batch:NAME` (its Batch API),
    `scripted:FILE`, `vllm:MODEL`, `smollm2-135m` (bundled), or a folder or hub id that
    transformers can load.
    """
    kind, _, name = settings.model.partition(":")
    if kind == "openai" and name:
        from aif.llm.openai_api import ApiLLM

        return ApiLLM(settings, name)
    if kind == "openai-batch" and name:
        from aif.llm.batch_api import BatchLLM

        return BatchLLM(settings, name)
    if kind == "scripted":
        from aif.llm.scripted import ScriptedLLM

        return ScriptedLLM.from_file(name)
    if kind == "vllm" and name:
        require(settings.model, "vllm", extra="vllm")
        from aif.llm.vllm import VLLM

        return VLLM(settings, name)
    if name:
        raise InputError(
            "model",
            "",
            got=repr(settings.model),
            expected="openai:NAME, scripted:FILE, openai-batch:NAME, vllm:MODEL, "
            f"{BUNDLED}, a folder or a hub id",
        )
    require(settings.model, "torch", "transformers", extra="local")
    from aif.llm.local import LocalLLM

    return LocalLLM(settings)
