"""The data of SFT: revisions, voted answers, responses, demonstrations, plain text.

    [sft.data]
    revisions = 1.0                 # each once an epoch
    "demonstrations.jsonl" = 0.5    # half of them, drawn anew for every epoch

A source is `revisions`, `votes` or `responses` (the run's own), a JSONL file, or hf:NAME[:SPLIT].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from aif.config.settings import SFTSettings, TrainSettings
from aif.data.readers import read_dialogues, read_rows
from aif.errors import InputError, shown
from aif.run import Run
from aif.store.records import Kept, Message, Prompt, Response, Revision, Vote, content_id

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Example:
    """A dialogue that ends in an assistant's turn, or a plain text."""

    id: str  # of the content alone, so that duplicates share it
    split_key: str  # examples with the same key are all trained on or all held out
    source: str
    messages: list[Message]  # empty: a plain text
    text: str = ""
    ended: bool = True  # False: the last turn was cut off, so its end is not learned


@dataclass(frozen=True, slots=True)
class Examples:
    """All distinct examples, and how many duplicates each source had."""

    rows: list[Example]
    duplicates: dict[str, int]


def read_examples(run: Run) -> Examples:
    """The distinct examples of every source in `sft.data`, in that order.

    Raises InputError for a bad row or a source without an example, AifError for a stage that has
    not run.
    """
    settings = run.settings.sft
    rows: list[Example] = []
    duplicates: dict[str, int] = {}
    for source in settings.data:
        examples = list(_from_source(run, source, settings))
        distinct = {example.id: example for example in examples}
        if not distinct:
            raise InputError(f"sft.data.{source}", "", got="no examples", expected="at least one")
        rows += distinct.values()
        duplicates[source] = len(examples) - len(distinct)
    if not rows:
        raise InputError("sft", "data", got="no source", expected="revisions, a JSONL file, ...")
    return Examples(rows, duplicates)


def _from_source(run: Run, source: str, settings: SFTSettings) -> Iterator[Example]:
    own: dict[str, Callable[[Run], Iterator[Example]]] = {
        "revisions": _revisions,
        "votes": _votes,
        "responses": _responses,
    }
    if settings.objective == "lm":
        if source in own:
            raise InputError(
                "sft", "data", got=shown(source), expected='JSONL with `text`, for objective = "lm"'
            )
        return _texts(source)
    return own[source](run) if source in own else _demonstrations(source)


def _revisions(run: Run) -> Iterator[Example]:
    """Good revisions, as `sft.revisions` picks among the rounds of each response."""
    settings = run.settings.sft
    rows = run.read("kept.jsonl", Kept) if settings.filtered else ()
    kept = {row.revision_id for row in rows if row.kept} if settings.filtered else None
    good: dict[str, list[Revision]] = {}
    for row in run.read("revisions.jsonl", Revision):
        if row.fault is None and row.revision and (kept is None or row.id in kept):
            good.setdefault(row.response_id, []).append(row)
    prompts = _prompts(run)
    for rows in good.values():
        rows.sort(key=lambda row: row.round)
        for row in {"all": rows, "first": rows[:1], "last": rows[-1:]}[settings.revisions]:
            yield _answered(prompts, row.prompt_id, row.revision, "revisions")


def _votes(run: Run) -> Iterator[Example]:
    """Responses with the most common final answer to their prompt."""
    voted = {
        id for vote in run.read("votes.jsonl", Vote) if not vote.fault
        for id in vote.response_ids
    }  # fmt: skip
    return _responses(run, "votes", voted)


def _responses(
    run: Run, source: str = "responses", ids: set[str] | None = None
) -> Iterator[Example]:
    """Good responses; with `ids`, only those."""
    prompts = _prompts(run)
    for row in run.read("responses.jsonl", Response):
        good = row.fault is None and row.text and row.text.strip()
        if good and (ids is None or row.id in ids):
            yield _answered(prompts, row.prompt_id, row.text, source, row.finish != "length")


def _demonstrations(source: str) -> Iterator[Example]:
    return (_dialogue(messages, source) for _, messages in read_dialogues(source))


def _texts(source: str) -> Iterator[Example]:
    """The `text` of every row, for continued pretraining."""
    for place, row in read_rows(source):
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            got = "nothing" if text is None else shown(text)
            raise InputError(place, "text", got=got, expected="a text")
        id = content_id("text", text)
        yield Example(id, id, source, [], text)


def _prompts(run: Run) -> dict[str, list[Message]]:
    return {row.id: row.messages for row in run.read("prompts.jsonl", Prompt)}


def _answered(
    prompts: dict[str, list[Message]], prompt_id: str, text: str, source: str, ended: bool = True
) -> Example:
    if prompt_id not in prompts:
        raise InputError(
            "prompts.jsonl", "", got=f"no prompt {shown(prompt_id[:12])}",
            expected=f"the prompt of every row of {source}",
        )  # fmt: skip
    return _dialogue(
        [*prompts[prompt_id], {"role": "assistant", "content": text}], source, ended=ended
    )


def _dialogue(messages: list[Message], source: str, *, ended: bool = True) -> Example:
    key = split_key(messages)
    return Example(content_id("dialogue", messages), key, source, messages, ended=ended)


def answers_of(prompt: list[Message], texts: Iterable[str], source: str = "") -> list[Example]:
    """Each text as an answer to `prompt`."""
    answers = [[*prompt, {"role": "assistant", "content": text}] for text in texts]
    return [Example("", "", source, messages) for messages in answers]


def split_key(messages: list[Message]) -> str:
    """The key that decides on which side of a split a dialogue is: its start, up to the first turn
    of the user.

    Data sets have one conversation at many lengths. If its early turns are held out, its later
    turns must not be trained on.
    """
    turns = [message["role"] for message in messages]
    opening = messages[: turns.index("user") + 1] if "user" in turns else messages
    return content_id("prompt", opening)


def held_out(keys: Iterable[str], fraction: float, seed: int) -> set[str]:
    """The split keys for evaluation: those whose hash, in [0, 1), is below `fraction`.

    A key's hash depends on the key and `seed` alone, so more data moves no key. If no hash is below
    `fraction`, the lowest key is held out; if all are, the highest is left to train on.
    """
    place = {key: _hash("held out", seed, key) for key in keys}
    if fraction == 0 or len(place) < 2:
        return set()
    out = {key for key, at in place.items() if at < fraction} or {min(place, key=place.get)}
    return out - {max(place, key=place.get)} if len(out) == len(place) else out


def split(rows: Sequence[T], settings: TrainSettings) -> tuple[list[T], list[T]]:
    """(rows to train on, rows held out), by their `split_key`; no key is in both."""
    out = held_out((row.split_key for row in rows), settings.eval_fraction, settings.seed)
    train = [row for row in rows if row.split_key not in out]
    return train, [row for row in rows if row.split_key in out]


def mirror_mixture(rows: Sequence[Example], settings: SFTSettings) -> list[Example]:
    """The distinct examples in the proportions of training: a tenth of a source of weight 0.1."""
    distinct = {row.id: row for row in rows}
    mirrored = [
        row for row in distinct.values()
        if _hash("shown", settings.seed, row.id) < settings.data[row.source]
    ]  # fmt: skip
    return mirrored or list(distinct.values())[:1]


def _hash(*parts: object) -> float:
    """A number in [0, 1) that is a function of `parts` alone."""
    return int(content_id(*parts)[:13], 16) / 16**13
