"""A language model in this process, on transformers.

    LocalLLM(LLMSettings(model="smollm2-135m"))      # or a folder, or a hub id

Scoring (an ask with options) computes every shared prefix once: the preamble that all asks begin
with, and the texts that several questions are asked about. The caller declares nothing; see
`aif.llm.score`. Nothing is loaded before the first ask, and weights only for an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from jinja2 import TemplateError

from aif.errors import InputError, shown
from aif.llm import LLM, Answer, Ask, ended
from aif.llm.generate import Draw, Drawn, generate
from aif.llm.score import PrefixScorer
from aif.pretrained import ends_of, load_model, load_tokenizer
from aif.records import content_id
from aif.settings import LLMSettings

LOOK_AHEAD = 512  # asks sorted together, so that what they share stands side by side
MAX_CHARS_PER_TOKEN = 16  # a text with more than this a context token is refused untokenised


@dataclass(frozen=True, slots=True)
class Row:
    """An ask and its whole prompt in tokens."""

    ask: Ask
    ids: tuple[int, ...]


class Refused(Exception):
    """This ask cannot be put to the model: (fault, detail)."""


class LocalLLM(LLM):
    """The `LLM` protocol on one transformers model. Raises `InputError` where it cannot load."""

    def __init__(self, settings: LLMSettings):
        self.settings = settings

    @cached_property
    def _reader(self) -> tuple[Any, int]:
        return load_tokenizer(self.settings.model)

    @property
    def tokenizer(self) -> Any:
        return self._reader[0]

    @property
    def context(self) -> int:
        """The longest prompt plus answer, in tokens."""
        return self._reader[1]

    @cached_property
    def model(self) -> Any:
        """The transformers model; loaded when first wanted."""
        model = load_model(self.settings.model, self.settings.dtype, self.settings.device)
        head_in_float32(model)
        return model

    @cached_property
    def _scorer(self) -> PrefixScorer:
        return PrefixScorer(self.model)

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Strings that the tokenizer reads as control rather than text, like `<|im_end|>`."""
        added = self.tokenizer.get_added_vocab()
        return tuple(sorted({*added, *self.tokenizer.all_special_tokens}))

    def answer(self, asks: Iterable[Ask]) -> Iterator[Answer]:
        asks = iter(asks)
        while chunk := list(islice(asks, LOOK_AHEAD)):
            rows = []
            for ask in chunk:
                try:
                    rows.append(Row(ask, self._tokens(ask)))
                except Refused as refused:
                    fault, detail = refused.args
                    yield Answer(ask.key, fault=fault, detail=detail)
            scored = [row for row in rows if row.ask.options]
            yield from self._score([row for row in scored if row.ask.max_tokens == 1])
            both = [row for row in scored if row.ask.max_tokens > 1]
            logprobs = {answer.key: answer for answer in self._score(both)}
            yield from self._write([row for row in rows if not row.ask.options] + both, logprobs)

    def count_tokens(self, asks: Iterable[Ask]) -> tuple[int, bool]:
        """Exact; an ask that would be refused (it does not fit the context) counts nothing."""
        total = 0
        for ask in asks:
            try:
                total += len(self._tokens(ask))
            except Refused:
                continue
        return total, True

    def close(self) -> None:
        for name in ("_scorer", "model"):
            vars(self).pop(name, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _tokens(self, ask: Ask) -> tuple[int, ...]:
        """The whole prompt in tokens, at least one. Raises `Refused`."""
        texts = [ask.text] if ask.text is not None else [m["content"] for m in ask.messages or []]
        chars = sum(map(len, texts))
        if chars > self.context * MAX_CHARS_PER_TOKEN:
            raise Refused("too_long", f"{chars} characters; the context is {self.context} tokens")
        try:
            if ask.text is not None:
                ids = tuple(self.tokenizer(ask.text)["input_ids"])
            else:
                ids = tuple(self.tokenizer(self._chat(ask), add_special_tokens=False)["input_ids"])
        except (TypeError, ValueError, TemplateError) as error:  # a lone surrogate, odd roles
            raise Refused("rejected", f"cannot be tokenised: {shown(str(error), 120)}") from error
        if not ids:
            raise Refused("rejected", "the prompt is empty")
        if len(ids) + ask.max_tokens > self.context:
            raise Refused(
                "too_long",
                f"{len(ids)} tokens and {ask.max_tokens} to come; the context is {self.context}",
            )
        return ids

    def _chat(self, ask: Ask) -> str:
        if not self.tokenizer.chat_template:
            raise InputError(
                "form",
                "",
                got=f"a chat for {self.settings.model!r}, whose tokenizer has no chat template",
                expected='form = "text"',
            )
        return self.tokenizer.apply_chat_template(
            ask.messages, add_generation_prompt=True, tokenize=False
        )

    def _score(self, rows: list[Row]) -> Iterator[Answer]:
        for i, logprobs_V in self._scorer.score([row.ids for row in rows]) if rows else ():
            ask, n_prompt = rows[i].ask, len(rows[i].ids)
            if isinstance(logprobs_V, RuntimeError):
                yield Answer(ask.key, fault="backend", detail=shown(str(logprobs_V), 200))
            elif logprobs_V.isnan().any():
                yield Answer(ask.key, fault="backend", detail="the logits are not numbers")
            else:
                text = self._text([int(logprobs_V.argmax())])
                options = {
                    option: min(0.0, float(logprobs_V[self._option_ids(option)].logsumexp(0)))
                    for option in ask.options
                }
                usage = {"prompt_tokens": n_prompt, "completion_tokens": 1}
                yield Answer(ask.key, (text,), "length", options, usage=usage)

    def _write(self, rows: list[Row], scored: dict[str, Answer]) -> Iterator[Answer]:
        """Generates for `rows`; `scored` holds the option log-probabilities of those with any."""
        draws, owner = [], []
        for i, row in enumerate(rows):
            for sample in range(row.ask.samples):
                draws.append(_draw(row, sample))
                owner.append(i)
        done: dict[int, dict[int, Drawn | RuntimeError]] = {i: {} for i in range(len(rows))}
        eos = ends_of(self.model, self.tokenizer)
        pad = self.tokenizer.pad_token_id or 0
        for n, drawn in generate(self.model, draws, eos, pad, self._text):
            row = rows[owner[n]]
            done[owner[n]][n] = drawn
            if len(done[owner[n]]) == row.ask.samples:
                texts = [drawn for _, drawn in sorted(done.pop(owner[n]).items())]
                yield self._written(row, texts, scored.get(row.ask.key))

    def _written(
        self, row: Row, drawn: list[Drawn | RuntimeError], scored: Answer | None
    ) -> Answer:
        if scored is not None and scored.fault:
            return scored
        for one in drawn:
            if isinstance(one, RuntimeError):
                return Answer(row.ask.key, fault="backend", detail=shown(str(one), 200))
        answer = Answer(
            row.ask.key,
            tuple(self._text(one.ids) for one in drawn),
            "stop" if all(one.stopped for one in drawn) else "length",
            scored.logprobs if scored else None,
            usage={
                "prompt_tokens": len(row.ids),
                "completion_tokens": sum(len(one.ids) for one in drawn),
            },
        )
        return ended(answer, row.ask.stop)

    def _text(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    @cached_property
    def _ids_by_text(self) -> dict[str, list[int]]:
        """Every token of the vocabulary by its text, stripped and casefolded."""
        found: dict[str, list[int]] = {}
        texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        for i, text in enumerate(texts):
            found.setdefault(text.strip().casefold(), []).append(i)
        return found

    def _option_ids(self, option: str) -> list[int]:
        """The tokens that count for `option`; its first token where no single one spells it."""
        ids = self._ids_by_text.get(option.strip().casefold())
        return ids or self.tokenizer(option, add_special_tokens=False)["input_ids"][:1]


def head_in_float32(model: Any) -> None:
    """Compute logits in float32 whatever the rest is in.

    Logits are often near 20, where bfloat16 numbers are 0.125 apart: log-odds of two options
    would be multiples of that, and half of all close calls ties.
    """
    head = model.get_output_embeddings()
    # A weight of its own: the embedding, which may be tied to it, stays as it is.
    head.weight = torch.nn.Parameter(head.weight.detach().float(), requires_grad=False)
    head.float()
    head.register_forward_pre_hook(lambda _, args: (args[0].float(),))


def _draw(row: Row, sample: int) -> Draw:
    """One sample's draw; its seed is the ask's alone, so no other ask can change its text."""
    ask = row.ask
    seed = ask.key if ask.seed is None else ask.seed
    number = int(content_id("draw", seed, sample)[:15], 16)
    return Draw(row.ids, ask.max_tokens, ask.temperature, number, ask.stop)
