"""A language model in this process, on transformers.

    LocalLLM(LLMSettings(model="smollm2-135m"))      # or a folder, or a hub id

Scoring (an ask with options) computes every shared prefix once: the preamble that all asks begin
with, and the texts that several questions are asked about. The caller declares nothing; see
`aif.llm.score`. Nothing is loaded before the first ask, and weights only for an answer.
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
from aif.llm import LLM, SPELLED_TOKENS, Answer, Ask, ended
from aif.llm.option_logprobs import IMPOSSIBLE, begun
from aif.llm.prefix_scorer import PrefixScorer
from aif.llm.sampler import ROWS_CPU, Draw, generate
from aif.llm.verdict_text import is_refusal, parse_verdict
from aif.models.decode import SampledTokens
from aif.models.load import ends_of, load_model, load_tokenizer
from aif.store.records import content_id

LOOK_AHEAD = 512  # asks sorted together, so that what they share stands side by side
LED = 8  # tokens that a lead to the verdict may take
MAX_CHARS_PER_TOKEN = 16  # a text with more than this a context token is refused untokenised


Path = tuple[int, ...]  # tokens


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
            yield from self._reasoned([row for row in rows if row.ask.reads_the_end])
            rows = [row for row in rows if not row.ask.reads_the_end]
            scored = [row for row in rows if row.ask.options]
            yield from self._score([row for row in scored if _needs_no_text(row.ask)])
            both = [row for row in scored if not _needs_no_text(row.ask)]
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
            ids = self._ids(ask)
        except (TypeError, ValueError, TemplateError) as error:  # a lone surrogate, odd roles
            raise Refused("rejected", f"cannot be tokenised: {shown(str(error), 120)}") from error
        if not ids:
            raise Refused("rejected", "the prompt is empty")
        to_come = ask.max_tokens + (LED if ask.lead else 0)
        if len(ids) + to_come > self.context:
            raise Refused(
                "too_long",
                f"{len(ids)} tokens and {to_come} to come; the context is {self.context}",
            )
        return ids

    def _ids(self, ask: Ask, said: str = "") -> tuple[int, ...]:
        """The prompt in tokens, with what was said in answer behind it."""
        if ask.text is not None:
            return tuple(self.tokenizer(ask.text + said)["input_ids"])
        whole = self._chat(ask) + said
        return tuple(self.tokenizer(whole, add_special_tokens=False)["input_ids"])

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
        """Scores the options of `rows` as what follows their prompts."""
        for i, found in self._options_of(rows):
            ask, usage = rows[i].ask, {"prompt_tokens": len(rows[i].ids), "completion_tokens": 1}
            if isinstance(found, RuntimeError):
                yield Answer(ask.key, fault="backend", detail=shown(str(found), 200))
            else:
                text, options = found
                yield Answer(ask.key, (text,), "length", options, usage=usage)

    def _options_of(
        self, rows: list[Row]
    ) -> Iterator[tuple[int, tuple[str, dict[str, float]] | RuntimeError]]:
        """(index into `rows`, (likeliest text, each option's log-probability)) for each.

        Options that begin alike are followed token by token: every point that they pass is a
        prompt of its own, which shares all but its last token with the row's.
        """
        paths = {row.ask.options: self._paths(row.ask.options) for row in rows}
        points = {options: _points(found) for options, found in paths.items()}
        prompts = [(i, point) for i, row in enumerate(rows) for point in points[row.ask.options]]
        known: dict[int, dict[Path, dict[int, float]]] = {}
        scores = self._scorer.score([rows[i].ids + point for i, point in prompts]) if rows else ()
        for n, logprobs_V in scores:
            i, point = prompts[n]
            options, at = rows[i].ask.options, points[rows[i].ask.options]
            if i in known and not known[i]:  # it has failed
                continue
            if not isinstance(logprobs_V, RuntimeError) and logprobs_V.isnan().any():
                logprobs_V = RuntimeError("the logits are not numbers")
            if isinstance(logprobs_V, RuntimeError):
                known[i] = {}
                yield i, logprobs_V
            elif len(at) == 1:
                found = {
                    option: min(0.0, float(logprobs_V[self._option_ids(option)].logsumexp(0)))
                    for option in options
                }
                yield i, (self._text([int(logprobs_V.argmax())]), found)
            else:
                row = known.setdefault(i, {})
                row[point] = {token: float(logprobs_V[token]) for token in at[point]}
                if len(row) == len(at):
                    found = _followed(paths[options], known.pop(i))
                    yield i, (max(found, key=found.__getitem__), found)

    def _reasoned(self, rows: list[Row]) -> Iterator[Answer]:
        """Generates reasons, then scores the options in the place of each text's verdict; a text
        that ended without one is led to it (the two steps of Lee et al. 2023, 2309.00267)."""
        drawn = self._drawn(rows)
        while some := list(islice(drawn, ROWS_CPU)):  # a kill loses no more than these
            yield from self._with_ends(some)

    def _with_ends(
        self, rows: list[tuple[Row, list[SampledTokens | RuntimeError]]]
    ) -> Iterator[Answer]:
        """The answers that these texts are, each with its `ends`."""
        answers, endings, place = [], [], []
        for row, drawn in rows:
            answer = self._written(row, drawn, None)
            for n, text in enumerate(answer.texts):
                said = _until_verdict(row.ask, text, drawn[n].ended)
                if said is not None:
                    endings.append(Row(row.ask, self._ids(row.ask, said)))
                    place.append((len(answers), n))
            answers.append(answer)
        found: dict[tuple[int, int], dict[str, float]] = {}
        for i, scored in self._options_of(endings):
            which, n = place[i]
            if isinstance(scored, RuntimeError):
                fault = {"fault": "backend", "detail": shown(str(scored), 200)}
                answers[which] = Answer(answers[which].key, **fault)
            else:
                found[which, n] = scored[1]
        for which, answer in enumerate(answers):
            ends = tuple(found.get((which, n)) for n in range(len(answer.texts)))
            yield replace(answer, ends=ends if any(ends) else ())

    def _write(self, rows: list[Row], scored: dict[str, Answer]) -> Iterator[Answer]:
        """Generates for `rows`; `scored` holds the option log-probabilities of those with any."""
        for row, drawn in self._drawn(rows):
            yield self._written(row, drawn, scored.get(row.ask.key))

    def _drawn(self, rows: list[Row]) -> Iterator[tuple[Row, list[SampledTokens | RuntimeError]]]:
        """Each row with all of its samples."""
        draws, owner = [], []
        for i, row in enumerate(rows):
            for sample in range(row.ask.samples):
                draws.append(_draw(row, sample))
                owner.append(i)
        done: dict[int, dict[int, SampledTokens | RuntimeError]] = {i: {} for i in range(len(rows))}
        eos = ends_of(self.model, self.tokenizer)
        pad = self.tokenizer.pad_token_id or 0
        for n, drawn in generate(self.model, draws, eos, pad, self._text):
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
                return Answer(row.ask.key, fault="backend", detail=shown(str(one), 200))
        answer = Answer(
            row.ask.key,
            tuple(self._text(one.ids) for one in drawn),
            "stop" if all(one.ended for one in drawn) else "length",
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
        return self._one_token(option) or self._spelling(option)[:1]

    def _one_token(self, option: str) -> list[int]:
        return self._ids_by_text.get(option.strip().casefold(), [])

    def _spelling(self, option: str) -> list[int]:
        return self.tokenizer(option, add_special_tokens=False)["input_ids"]

    def _paths(self, options: tuple[str, ...]) -> dict[str, set[Path]]:
        """The tokens that make each option. Of options that begin alike the spelling counts, too,
        with a space before it and without: many tokenizers write 10 as 1, 0 and " 8" as " ", 8."""
        found = {option: {(i,) for i in self._option_ids(option)} for option in options}
        if begun(options):
            for option in options:
                spelled = {tuple(self._spelling(space + option)) for space in ("", " ")}
                one = {(i,) for i in self._one_token(option)}
                found[option] = one | {path for path in spelled if len(path) > 1}
        return found


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


def _needs_no_text(ask: Ask) -> bool:
    """Whether the tokens are wanted only to read the options from them."""
    return ask.max_tokens <= (SPELLED_TOKENS if begun(ask.options) else 1)


def _until_verdict(ask: Ask, text: str, stopped: bool) -> str | None:
    """What was said up to the option, or with the lead to it behind; None where a text was cut off
    on the way there, or declines to go."""
    stated = parse_verdict(text, ask.options)
    if stated is not None:
        return text[: stated.at].rstrip(" ")
    if not stopped or not text.strip() or is_refusal(text):
        return None
    return f"{text.rstrip()}\n{ask.lead}"


def _points(paths: dict[str, set[Path]]) -> dict[Path, set[int]]:
    """Every beginning that a path passes, with the tokens by which paths go on from there."""
    found: dict[Path, set[int]] = {}
    for path in (path for some in paths.values() for path in some):
        for n, token in enumerate(path):
            found.setdefault(path[:n], set()).add(token)
    return found


def _followed(paths: dict[str, set[Path]], known: dict[Path, dict[int, float]]) -> dict[str, float]:
    """Each option's log-probability, from that of each token at each point. What goes on to
    another option (1 to 10) is not the shorter one's."""
    p = {
        path: math.exp(sum(known[path[:n]][token] for n, token in enumerate(path)))
        for some in paths.values()
        for path in some
    }
    found = {}
    for option, own in paths.items():
        longer = {path for path in p.keys() - own for short in own if path[: len(short)] == short}
        mass = math.fsum(p[path] for path in own) - math.fsum(p[path] for path in longer)
        found[option] = math.log(mass) if mass > 0 else IMPOSSIBLE
    return {option: max(IMPOSSIBLE, min(0.0, value)) for option, value in found.items()}


def _draw(row: Row, sample: int) -> Draw:
    """One sample's draw; its seed is the ask's alone, so no other ask can change its text."""
    ask = row.ask
    seed = ask.key if ask.seed is None else ask.seed
    number = int(content_id("draw", seed, sample)[:15], 16)
    return Draw(row.ids, ask.max_tokens, ask.temperature, number, ask.stop)
