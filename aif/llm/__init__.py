"""What a language model is to aif: asks go in, answers come out in any order.

    with open_llm(settings) as llm:
        for answer in llm.answer(asks):
            ...

One protocol serves an HTTP server with hundreds of requests in flight, a local model that wants
large batches, and the scripted fake: each pulls from `asks` as fast as it can use them. To stop
early, let `asks` end; what is in flight is still answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from aif.config.settings import BUNDLED, LLMSettings
from aif.dependencies import require
from aif.errors import AifError, InputError
from aif.store.records import Message

# Enough to read options such as 1 and 10: a blank and two digits, for tokenizers that write them
# apart, and what tells that no digit follows.
SPELLED_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Ask:
    """One call: a chat (`messages`) or a plain text to continue (`text`), never both.

    With `options`, the log-probability of each option as the very next token is wanted (a
    token counts for an option when the two are equal but for case and surrounding spaces; of
    options that begin alike, as 1 and 10, all tokens do). With `lead` ("Verdict:") the text gives
    reasons first and ends in the lead and an option, and with `schema` it is JSON with the option
    as its "verdict": the log-probabilities are then wanted there (`Answer.ends`).
    A text ends before the first of `stop` that comes up in it.
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
    # Asked before a request is made once more, where the last one was paid for perhaps.
    again: Callable[[], bool] = field(default=lambda: True, compare=False)
    lead: str = ""
    schema: dict[str, Any] | None = None

    @property
    def reads_the_end(self) -> bool:
        """Whether the options are read where a text comes to its verdict, not where it begins."""
        return bool(self.options) and bool(self.lead or self.schema)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for the ask with the same key.

    `logprobs` maps each option to its log-probability (nats, <= 0) and is None where the model
    gives none; where the ask reads the end, `ends` has the same (or None) for each of `texts`. With
    a `fault` (see `records.FAULTS`) there is no answer, and `detail` says why.
    """

    key: str
    texts: tuple[str, ...] = ()
    finish: str | None = None
    logprobs: dict[str, float] | None = None
    fault: str | None = None
    detail: str = ""
    usage: dict[str, int] = field(default_factory=dict)  # prompt_tokens, completion_tokens
    unmetered: int = 0  # requests that were paid for perhaps, and whose usage nobody told
    ends: tuple[dict[str, float] | None, ...] = ()


def ended(answer: Answer, stops: tuple[str, ...]) -> Answer:
    """The answer with its texts cut before the first of `stops` in each."""
    texts = tuple(
        text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)]
        for text in answer.texts
    )
    if texts == answer.texts:
        return answer
    cut_all = all(len(new) < len(old) for new, old in zip(texts, answer.texts, strict=True))
    return replace(answer, texts=texts, finish="stop" if cut_all else answer.finish)


class LLM(AbstractContextManager["LLM"], Protocol):
    """A model that can be asked. Raises `JudgeStopped` when it cannot go on at all.

    `control_tokens` are the strings that its tokenizer treats as one special token, as far as
    they can be known from here.
    """

    control_tokens: tuple[str, ...]

    def answer(self, asks: Iterable[Ask]) -> Iterator[Answer]:
        """One answer for every ask, in any order, as they become known."""

    def count_tokens(self, asks: Iterable[Ask]) -> tuple[int, bool]:
        """Prompt tokens of all asks together, and whether that is exact (or an estimate)."""

    def close(self) -> None:
        """Free what the model holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Caller:
    """What a `Lasting` model is told of whoever asks it."""

    ledger: Path  # where to write down what is under way, in a folder that is locked for it
    commit: Callable[[], None]  # returns once every answer yielded so far is durable
    stopping: Callable[[], bool]  # whether a signal asks to end
    say: Callable[[str], None]  # a line for the person at the terminal


@runtime_checkable
class Lasting(Protocol):
    """An LLM whose calls outlive the process that made them, so that it can come back for them."""

    def attend(self, caller: Caller) -> None:
        """Told before `answer`."""


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
    if name and kind != "vllm":
        raise InputError(
            "model",
            "",
            got=repr(settings.model),
            expected="openai:NAME, scripted:FILE, openai-batch:NAME, vllm:MODEL, "
            f"{BUNDLED}, a folder or a hub id",
        )
    try:
        if name:
            require(settings.model, "vllm", extra="vllm")
            from aif.llm.vllm import VLLM

            return VLLM(settings, name)
        from aif.llm.local import LocalLLM
    except ModuleNotFoundError as error:
        raise AifError(
            f"{settings.model}: a local model needs {error.name}: pip install 'aif[local]'"
        ) from error
    return LocalLLM(settings)
