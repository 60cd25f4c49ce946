"""A language model in this process, on transformers.

    LocalLLM(LLMSettings(model="smollm2-135m"))      # or a folder, or a hub id

Reading options computes every shared prefix once: the preamble that all asks begin with, and the
texts that several questions are about; see `aif.llm.prefix_scorer`. Nothing is loaded before the
first ask, and weights only for an answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from jinja2 import TemplateError

from aif.config.settings import LLMSettings
from aif.errors import InputError, shown
from aif.llm import LLM, Answer, Ask
from aif.llm.option_logprobs import IMPOSSIBLE, SPELLED_TOKENS, Options, begun
from aif.llm.prefix_scorer import PrefixScorer, TokenIds
from aif.llm.sampler import ROWS_CPU, Draw, generate
from aif.llm.verdict_text import is_refusal, parse_verdict
from aif.models.decode import SampledTokens
from aif.models.load import ends_of, load_model, load_tokenizer
from aif.store.records import content_id

LOOK_AHEAD = 512  # asks sorted together, so that shared prefixes stand side by side
LEAD_TOKENS = 8  # the most that a lead to the verdict may take
MAX_CHARS_PER_TOKEN = 16  # a text with more than this per token of context is refused untokenised


@dataclass(frozen=True, slots=True)
class Row:
    """An ask and its whole prompt in tokens."""

    ask: Ask
    ids: TokenIds

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """`Answer.usage`."""
        return {"prompt_tokens": len(self.ids), "completion_tokens": completion_tokens}


class AskRefused(Exception):
    """The model cannot take this ask: (fault, detail)."""


class LocalLLM(LLM):
    """The `LLM` protocol on one transformers model. Raises `InputError` if it cannot load."""

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
        """The transformers model; loaded at first use."""
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
                except AskRefused as refused:
                    fault, detail = refused.args
                    yield Answer(ask.key, fault=fault, detail=detail)
            yield from self._reasoned([row for row in rows if row.ask.reads_the_end])
            rows = [row for row in rows if not row.ask.reads_the_end]
            scored = [row for row in rows if row.ask.options]
            yield from self._score([row for row in scored if _needs_no_text(row.ask)])
            both = [row for row in scored if not _needs_no_text(row.ask)]
            logprobs = {answer.key: answer for answer in self._score(both)}
            rows = [row for row in rows if not row.ask.options] + both
            for row, drawn in self._drawn(rows):
                yield self._written(row, drawn, logprobs.get(row.ask.key))

    def count_tokens(self, asks: Iterable[Ask]) -> tuple[int, bool]:
        """Exact; an ask that would be refused (it does not fit the context) counts as 0."""
        total = 0
        for ask in asks:
            try:
                total += len(self._tokens(ask))
            except AskRefused:
                continue
        return total, True

    def close(self) -> None:
        for name in ("_scorer", "model"):
            vars(self).pop(name, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _tokens(self, ask: Ask) -> TokenIds:
        """The whole prompt in tokens, at least one. Raises `AskRefused`."""
        chars = sum(map(len, ask.texts))
        if chars > self.context * MAX_CHARS_PER_TOKEN:
            detail = f"{chars} characters; the context is {self.context} tokens"
            raise AskRefused("too_long", detail)
        try:
            ids = self._ids(ask)
        except (TypeError, ValueError, TemplateError) as error:  # a lone surrogate, odd roles
            detail = f"cannot be tokenised: {shown(str(error), 120)}"
            raise AskRefused("rejected", detail) from error
        if not ids:
            raise AskRefused("rejected", "the prompt is empty")
        to_come = ask.max_tokens + (LEAD_TOKENS if ask.lead else 0)
        if len(ids) + to_come > self.context:
            detail = f"{len(ids)} tokens and {to_come} to come; the context is {self.context}"
            raise AskRefused("too_long", detail)
        return ids

    def _ids(self, ask: Ask, answer: str = "") -> TokenIds:
        """The prompt in tokens, and the beginning of an answer after it."""
        if ask.text is not None:
            return tuple(self.tokenizer(ask.text + answer)["input_ids"])
        return tuple(self._spelling(self._chat(ask) + answer))

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
        """Reads the options of `rows` as the next token of their prompts."""
        for i, outcome in self._options_of(rows):
            row = rows[i]
            if isinstance(outcome, RuntimeError):
                yield _failed(row.ask, outcome)
            else:
                text, options = outcome
                yield Answer(row.ask.key, (text,), "length", options, usage=row.usage(1))

    def _options_of(
        self, rows: list[Row]
    ) -> Iterator[tuple[int, tuple[str, Options] | RuntimeError]]:
        """(index into `rows`, (the most probable text, each option's log-probability)) for each.

        Options that begin alike are read token by token: each of their beginnings ("points") is
        a prompt of its own, which shares the row's prompt.
        """
        spellings = {row.ask.options: self._spellings(row.ask.options) for row in rows}
        points = {options: _points(of) for options, of in spellings.items()}
        prompts = [(i, point) for i, row in enumerate(rows) for point in points[row.ask.options]]
        by_row: dict[int, dict[TokenIds, dict[int, float]]] = {}  # {} for a row that has failed
        ids = [rows[i].ids + point for i, point in prompts]
        for n, logprobs_V in self._scorer.next_logprobs(ids) if ids else ():
            i, point = prompts[n]
            options, at = rows[i].ask.options, points[rows[i].ask.options]
            if i in by_row and not by_row[i]:
                continue
            if not isinstance(logprobs_V, RuntimeError) and logprobs_V.isnan().any():
                logprobs_V = RuntimeError("the logits are not numbers")
            if isinstance(logprobs_V, RuntimeError):
                by_row[i] = {}
                yield i, logprobs_V
            elif len(at) == 1:
                logprobs = {
                    option: min(0.0, float(logprobs_V[self._option_ids(option)].logsumexp(0)))
                    for option in options
                }
                yield i, (self._text([int(logprobs_V.argmax())]), logprobs)
            else:
                row = by_row.setdefault(i, {})
                row[point] = {token: float(logprobs_V[token]) for token in at[point]}
                if len(row) == len(at):
                    logprobs = _spelled_logprobs(spellings[options], by_row.pop(i))
                    yield i, (max(logprobs, key=logprobs.__getitem__), logprobs)

    def _reasoned(self, rows: list[Row]) -> Iterator[Answer]:
        """Generates reasons, then reads the options at the verdict of each text; a text that ended
        without a verdict gets the lead to one (the two steps of Lee et al. 2023, 2309.00267)."""
        drawn = self._drawn(rows)
        while some := list(islice(drawn, ROWS_CPU)):  # a kill loses no more than these
            yield from self._with_ends(some)

    def _with_ends(
        self, rows: list[tuple[Row, list[SampledTokens | RuntimeError]]]
    ) -> Iterator[Answer]:
        """The answers with these texts, each with its `ends`."""
        answers, endings, place = [], [], []
        for row, drawn in rows:
            answer = self._written(row, drawn, None)
            for n, text in enumerate(answer.texts):
                reasons = _until_verdict(row.ask, text, drawn[n].ended)
                if reasons is not None:
                    endings.append(Row(row.ask, self._ids(row.ask, reasons)))
                    place.append((len(answers), n))
            answers.append(answer)
        options: dict[tuple[int, int], Options] = {}
        for i, outcome in self._options_of(endings):
            which, n = place[i]
            if isinstance(outcome, RuntimeError):
                answers[which] = _failed(endings[i].ask, outcome)
            else:
                options[which, n] = outcome[1]
        for which, answer in enumerate(answers):
            ends = tuple(options.get((which, n)) for n in range(len(answer.texts)))
            yield replace(answer, ends=ends if any(ends) else ())

    def _drawn(self, rows: list[Row]) -> Iterator[tuple[Row, list[SampledTokens | RuntimeError]]]:
        """Each row with all of its samples."""
        draws, owner = [], []
        for i, row in enumerate(rows):
            for sample in range(row.ask.samples):
                seed = seed_of(row.ask, sample)
                draws.append(
                    Draw(row.ids, row.ask.max_tokens, row.ask.temperature, seed, row.ask.stop)
                )
                owner.append(i)
        done: dict[int, dict[int, SampledTokens | RuntimeError]] = {i: {} for i in range(len(rows))}
        eos = ends_of(self.model, self.tokenizer)
        pad = self.tokenizer.pad_token_id or 0
        for n, drawn in generate(self.model, draws, eos, pad, self._text, self.note):
            row = rows[owner[n]]
            done[owner[n]][n] = drawn
            if len(done[owner[n]]) == row.ask.samples:
                yield row, [drawn for _, drawn in sorted(done.pop(owner[n]).items())]

    def _written(
        self, row: Row, drawn: list[SampledTokens | RuntimeError], scored: Answer | None
    ) -> Answer:
        if scored is not None and scored.fault:
            return scored
        for one in drawn:
            if isinstance(one, RuntimeError):
                return _failed(row.ask, one)
        answer = Answer(
            row.ask.key,
            tuple(self._text(one.ids) for one in drawn),
            "stop" if all(one.ended for one in drawn) else "length",
            scored.logprobs if scored else None,
            usage=row.usage(sum(len(one.ids) for one in drawn)),
        )
        return answer.cut(row.ask)

    def _text(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    @cached_property
    def _ids_by_text(self) -> dict[str, list[int]]:
        """Every token of the vocabulary by its text, stripped and casefolded."""
        ids: dict[str, list[int]] = {}
        texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        for i, text in enumerate(texts):
            ids.setdefault(text.strip().casefold(), []).append(i)
        return ids

    def _option_ids(self, option: str) -> list[int]:
        """The tokens that count for `option`; its first token if no single one spells it."""
        return self._one_token(option) or self._spelling(option)[:1]

    def _one_token(self, option: str) -> list[int]:
        return self._ids_by_text.get(option.strip().casefold(), [])

    def _spelling(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _spellings(self, options: tuple[str, ...]) -> dict[str, set[TokenIds]]:
        """The tokens of each option. For options that begin alike several tokens count, too, with
        a space before them and without: many tokenizers write 10 as 1, 0 and " 8" as " ", 8."""
        if not begun(options):
            return {option: {(i,) for i in self._option_ids(option)} for option in options}
        spellings = {}
        for option in options:
            spelled = {tuple(self._spelling(space + option)) for space in ("", " ")}
            one = {(i,) for i in self._one_token(option)}
            spellings[option] = one | {ids for ids in spelled if len(ids) > 1}
        return spellings


def head_in_float32(model: Any) -> None:
    """Compute logits in float32 whatever the rest is in.

    Logits are often near 20, where bfloat16 numbers are 0.125 apart: log-odds of two options
    would be multiples of that, and half of all close calls would be ties.
    """
    head = model.get_output_embeddings()
    # A weight of its own: the embedding, which may be tied to it, stays as it is.
    head.weight = torch.nn.Parameter(head.weight.detach().float(), requires_grad=False)
    head.float()
    head.register_forward_pre_hook(lambda _, args: (args[0].float(),))


def _needs_no_text(ask: Ask) -> bool:
    """Whether the ask wants tokens only to read its options from them."""
    return ask.max_tokens <= (SPELLED_TOKENS if begun(ask.options) else 1)


def _until_verdict(ask: Ask, text: str, stopped: bool) -> str | None:
    """The text up to its option, or the whole text and the lead to an option; None if the text was
    cut off before a verdict, or is a refusal."""
    stated = parse_verdict(text, ask.options)
    if stated is not None:
        return text[: stated.at].rstrip(" ")
    if not stopped or not text.strip() or is_refusal(text):
        return None
    return f"{text.rstrip()}\n{ask.lead}"


def _failed(ask: Ask, error: RuntimeError) -> Answer:
    return Answer(ask.key, fault="backend", detail=shown(str(error), 200))


def _points(spellings: dict[str, set[TokenIds]]) -> dict[TokenIds, set[int]]:
    """Every proper beginning of a spelling, with the tokens that follow it in some spelling."""
    points: dict[TokenIds, set[int]] = {}
    for ids in set().union(*spellings.values()):
        for n, token in enumerate(ids):
            points.setdefault(ids[:n], set()).add(token)
    return points


def _spelled_logprobs(
    spellings: dict[str, set[TokenIds]], logprobs: dict[TokenIds, dict[int, float]]
) -> Options:
    """Each option's log-probability, from each token's at each point. The probability of a longer
    option (10) is taken off that of the shorter one (1)."""
    p = {
        ids: math.exp(sum(logprobs[ids[:n]][token] for n, token in enumerate(ids)))
        for ids in set().union(*spellings.values())
    }
    options = {}
    for option, own in spellings.items():
        longer = {ids for ids in p.keys() - own for short in own if ids[: len(short)] == short}
        mass = math.fsum(p[ids] for ids in own) - math.fsum(p[ids] for ids in longer)
        options[option] = max(IMPOSSIBLE, min(0.0, math.log(mass))) if mass > 0 else IMPOSSIBLE
    return options


def seed_of(ask: Ask, sample: int) -> int:
    """The seed of one sample; it depends on its ask alone, so no other ask changes its text."""
    return int(content_id("draw", ask.key if ask.seed is None else ask.seed, sample)[:15], 16)
