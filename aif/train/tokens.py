"""Examples as tokens, with a mask of the tokens that are learned.

A dialogue is rendered with the chat template. The tokens of its prompt are exactly those that a
local model generates from: the tokens of the rendered prompt by itself. The answer is tokenised
after its prompt (SentencePiece writes a word differently at the start of a text), or by itself in
the rare case that a token would cross the border.

An assistant's text and the token that ends the turn are learned. The system message, the user's
turns, the template's headers, the newline after the end of a turn, and padding are not.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError

from aif.data.transcript import transcript
from aif.errors import AifError, InputError, shown
from aif.models.load import load_tokenizer
from aif.run import Run
from aif.store.records import LONE_SURROGATE, Message
from aif.train.examples import Example

CHUNK = 256  # examples in a call of the tokenizer, which works on them in parallel


@dataclass(frozen=True, slots=True, eq=False)
class TokenRow:
    """One sequence of T tokens."""

    ids_T: np.ndarray  # int32
    loss_mask_T: np.ndarray  # bool, True where a token is learned from those before it
    source: str

    def __len__(self) -> int:
        return len(self.ids_T)

    def cut(self, length: int) -> TokenRow:
        """Its first `length` tokens."""
        return TokenRow(self.ids_T[:length], self.loss_mask_T[:length], self.source)


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A dialogue as text; a turn that is learned lies at text[start:end]."""

    text: str
    turns: list[tuple[int, int]]  # the last of them is the last turn


class Tokeniser:
    """Turns dialogues into tokens by `tokenizer` and its chat template.

    `chat` is False for a model of plain text: the dialogue is then a transcript,
    "User: ...\\n\\nAssistant: ...", and EOS follows. `ends` collects the tokens that end a
    response.

    A dialogue of more than `max_tokens` loses its oldest whole turns, but not its system message,
    until it fits. If the last prompt is too long even alone, the response is cut at its end, and
    its EOS is not learned. If no token of the response fits, the dialogue is dropped.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_tokens: int,
        loss_on: Literal["response", "assistant"] = "response",
        chat: bool = True,
    ):
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.loss_on = loss_on
        self.chat = chat and bool(tokenizer.chat_template)
        self.truncated = 0  # oldest turns left out, or the response cut at its end
        self.dropped = 0  # no room for a single token of the response, or nothing in it
        self.ends: set[int] = set()
        self._control = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}

    def dialogues(self, examples: Sequence[Example]) -> Iterator[TokenRow]:
        """The tokens of each example that is not dropped, in order.

        Raises InputError if the template refuses a dialogue or hides where its turns are.
        """
        for rows in self.answers([[example] for example in examples]):
            yield from rows or ()

    def answers(self, groups: Sequence[Sequence[Example]]) -> Iterator[list[TokenRow] | None]:
        """The tokens of each group of answers to one prompt; None for a group that is dropped.

        All answers of a group keep the same turns of their prompt, since a comparison is of answers
        to the same words.
        """
        for start in range(0, len(groups), CHUNK):
            part = groups[start : start + CHUNK]
            flat = [example for group in part for example in group]
            rows = self._tokenised([_clean(example.messages) for example in flat], flat)
            for group in part:
                yield self._fitted(group, [next(rows) for _ in group])

    def prompts(self, dialogues: Iterable[list[Message]], room: int) -> Iterator[np.ndarray | None]:
        """The tokens of each prompt, ready to be answered in `room` tokens; None for one that does
        not fit even without its oldest turns."""
        for messages in dialogues:
            # The same turns are left out as before an answer.
            talk: list[Message] | None = [*_clean(messages), {"role": "assistant", "content": ""}]
            while talk is not None:
                (ids,) = self._encoded([self._text(talk[:-1], prompt=True)])
                if len(ids) + room <= self.max_tokens:
                    break
                talk = _without_oldest(talk)
            self.dropped += talk is None
            yield None if talk is None else np.array(ids, np.int32)

    def _fitted(self, group: Sequence[Example], rows: list[TokenRow]) -> list[TokenRow] | None:
        """The group within `max_tokens` by the rule above; None if it is dropped."""
        dialogues: list[list[Message] | None] = [_clean(example.messages) for example in group]
        too_long = False
        while max(map(len, rows)) > self.max_tokens:
            too_long = True
            dialogues = [_without_oldest(messages) for messages in dialogues]
            if None in dialogues:
                break
            rows = list(self._tokenised(dialogues, group))
        rows = [row.cut(self.max_tokens) for row in rows]
        fits = all(row.loss_mask_T.any() for row in rows)
        self.truncated += too_long and fits
        self.dropped += not fits
        return rows if fits else None

    def _rendered(self, messages: list[Message]) -> _Rendered:
        text = self._text(messages)
        last = len(messages) - 1
        turns = []
        for n in range(1, len(messages)):
            if messages[n]["role"] != "assistant" or (self.loss_on == "response" and n < last):
                continue
            before = self._text(messages[:n], prompt=True)
            upto = text if n == last else self._text(messages[: n + 1])
            if not text.startswith(before):
                raise _hidden("a turn otherwise than it prompts for one")
            if not text.startswith(upto):
                raise _hidden("a turn otherwise once others follow (loss_on = 'response' goes)")
            turns.append((len(before), len(upto)))
        return _Rendered(text, turns)

    def _text(self, messages: list[Message], prompt: bool = False) -> str:
        if not self.chat:
            return transcript(messages, prompt)
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=prompt, tokenize=False
            )
        except (TypeError, ValueError, TemplateError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                "chat template", "", got=f"turns {roles} ({shown(str(error))})",
                expected="turns that the model's template takes",
            ) from error  # fmt: skip

    def _encoded(self, texts: list[str]) -> list[list[int]]:
        # A template writes BOS itself, if there is one; a plain text gets it from the tokenizer.
        return self.tokenizer(texts, add_special_tokens=not self.chat)["input_ids"] if texts else []

    def _tokenised(
        self, dialogues: Sequence[list[Message]], examples: Sequence[Example]
    ) -> Iterator[TokenRow]:
        """The tokens of each dialogue, of any length; `examples` are where they come from."""
        rendered = [self._rendered(messages) for messages in dialogues]
        borders = [sorted({*sum(r.turns, ()), len(r.text)}) for r in rendered]
        prefixes = [r.text[:b] for r, bs in zip(rendered, borders, strict=True) for b in bs]
        encoded = iter(self._encoded(prefixes))
        for r, bs, example in zip(rendered, borders, examples, strict=True):
            ids: list[int] = []
            at = {}  # a border in the text -> in the tokens
            before = 0
            for border in bs:
                whole = next(encoded)
                if whole[: len(ids)] == ids:
                    ids = whole
                else:  # a token crosses the last border: the part after it is tokenised alone
                    part = r.text[before:border]
                    ids = ids + self.tokenizer(part, add_special_tokens=False)["input_ids"]
                at[border] = len(ids)
                before = border
            spans = [(at[start], at[end]) for start, end in r.turns]
            yield self._marked(ids, spans, example)

    def _marked(self, ids: list[int], spans: list[tuple[int, int]], example: Example) -> TokenRow:
        """Mark each turn up to the token that ends it; the sequence ends with its last turn."""
        mask = [False] * len(ids)
        for start, end in spans[:-1]:
            stop = self._stop(ids, start, end)
            mask[start : stop or end] = [True] * ((stop or end) - start)
        start, end = spans[-1]
        stop = self._stop(ids, start, end)
        ids = ids[: stop or end]
        if not example.ended:
            ids = ids[:-1] if stop else ids
        elif not stop:
            if self.tokenizer.eos_token_id is None:
                raise InputError("model", "", got="a tokenizer without EOS", expected="one with it")
            ids = [*ids, self.tokenizer.eos_token_id]
        if example.ended:
            self.ends.add(ids[-1])
        mask = mask[:start] + [True] * (len(ids) - start)
        return TokenRow(np.array(ids, np.int32), np.array(mask, bool), example.source)

    def _stop(self, ids: list[int], start: int, end: int) -> int | None:
        """The place after the control token that ends the turn, if the template writes one.

        Chat templates end a turn with <|im_end|> or the like, many with a newline after it, which a
        model never generates: it has stopped by then.
        """
        for n in range(end, start, -1):
            if ids[n - 1] in self._control:
                return n
            if self.tokenizer.decode(ids[n - 1 : n]).strip():
                return None
        return None


def tokeniser_of(run: Run, name: str, max_tokens: int, **options: Any) -> Tokeniser:
    """The tokeniser of the model `name` in the form of the run's policy, within its context."""
    tokenizer, context = load_tokenizer(name)
    chat = run.settings.policy.form != "text"
    return Tokeniser(tokenizer, min(max_tokens, context), chat=chat, **options)


def check_any(stage: str, rows: Sequence[Any], of: str, tokeniser: Tokeniser) -> None:
    """Raise AifError if no row is left to train on; `of` names what there was."""
    if not rows:
        raise AifError(
            f"{stage}: none of {of} is left to learn from; {tokeniser.dropped:,} do not fit into "
            f"{tokeniser.max_tokens:,} tokens ({stage}.max_tokens)"
        )


def _without_oldest(messages: list[Message]) -> list[Message] | None:
    """The dialogue without its oldest turns, up to the next turn of the user; None if none can
    go."""
    head = int(messages[0]["role"] == "system")
    for n in range(head + 1, len(messages) - 1):
        if messages[n]["role"] == "user":
            return messages[:head] + messages[n:]
    return None


def _clean(messages: list[Message]) -> list[Message]:
    """The messages with lone surrogates, which no tokenizer takes, as U+FFFD."""
    return [message | {"content": _whole(message["content"])} for message in messages]


def _whole(text: str) -> str:
    return LONE_SURROGATE.sub("\ufffd", text)


def _hidden(what: str) -> InputError:
    return InputError(
        "chat template", "", got=f"one that writes {what}",
        expected="one whose text before an answer is the start of the text with the answer",
    )  # fmt: skip


def blocks(
    tokenizer: Any, examples: Sequence[Example], max_tokens: int, seed: int
) -> Iterator[TokenRow]:
    """Plain texts, shuffled by `seed` within their source, as blocks of `max_tokens` tokens.

    EOS stands between texts, and each source's last block may be shorter. Every token but a
    block's first is learned.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("model", "", got="a tokenizer without EOS", expected="one with it")
    by_source: dict[str, list[str]] = {}
    for example in examples:
        by_source.setdefault(example.source, []).append(_whole(example.text))
    for source, texts in by_source.items():
        random.Random(f"blocks {seed} {source}").shuffle(texts)
        stream: list[int] = []
        for start in range(0, len(texts), CHUNK):
            for ids in tokenizer(texts[start : start + CHUNK])["input_ids"]:
                stream += ids
                if not ids or ids[-1] != tokenizer.eos_token_id:
                    stream.append(tokenizer.eos_token_id)
        for start in range(0, len(stream), max_tokens):
            ids_T = np.array(stream[start : start + max_tokens], np.int32)
            if len(ids_T) > 1:
                yield TokenRow(ids_T, np.arange(len(ids_T)) > 0, source)


def token_digest(rows: Iterable[TokenRow]) -> str:
    """A sha256 of every row's tokens, mask and source."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.source, len(row))).encode())
        digest.update(row.ids_T.tobytes())
        digest.update(row.loss_mask_T.tobytes())
    return digest.hexdigest()
