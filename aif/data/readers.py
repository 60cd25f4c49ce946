"""Read preference data: rows in any of the usual shapes become comparisons.

    {"prompt": "...", "response_a": "...", "response_b": "..."}
    {"prompt": [{"role": "user", "content": "..."}], "chosen": "...", "rejected": "..."}
    {"prompt": "...", "responses": ["...", "...", "..."], "scores": [3, 1, 2]}

Other shapes are HH (whole dialogues as text), UltraFeedback and TRL (standard, conversational,
implicit prompt). Other names are `instruction`/`input`, `response1`/`response2`, `conversations`.

The choice of a human is not part of the comparison, and it does not decide which response is first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from aif.errors import AifError, InputError, shown
from aif.store import jsonl
from aif.store.records import Comparison, HumanChoice, Message, Prompt, content_id

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "ai": "assistant"}
ROLES |= {role: role for role in ("system", "user", "assistant")}
PAIR_NAMES = (
    ("response_a", "response_b"),
    ("response_1", "response_2"),
    ("response1", "response2"),
    ("output_1", "output_2"),
)
MAX_RESPONSES = 64
# A demonstration's answer is under the first of these names that the row has.
RESPONSE_NAMES = ("response", "completion", "output", "answer", "demonstration", "chosen")
_HH_ANSWER = "\n\nAssistant:"
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True, slots=True)
class Pair:
    """A comparison with the choice of a human, if there is one."""

    comparison: Comparison
    human: HumanChoice | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt with the response and the mark that its row has, if any."""

    prompt: Prompt
    response: str | None = None
    harmful: bool | None = None  # whether the prompt asks for harm; None: not marked


def read_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) for each row of a JSONL file or of `hf:NAME[:SPLIT]`."""
    if source.startswith("hf:"):
        yield from _hub_rows(source)
    else:
        for number, row in jsonl.read(Path(source)):
            yield f"{source}:{number}", row


def _hub_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets

    name, _, split = source.removeprefix("hf:").partition(":")
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the library raises many unrelated types here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AifError(f"{source}: datasets could not load it: {reason}") from error
    for number, row in enumerate(rows, 1):
        yield f"{source}:{number}", {key: value for key, value in row.items() if value is not None}


def read_prompts(source: str) -> Iterator[Prompt]:
    """The prompts of a file: `prompt` (text or messages), or another name for it."""
    for place, row in read_rows(source):
        yield Prompt.of(_prompt(row, place), str(row.get("id", "")))


def read_questions(source: str) -> Iterator[Question]:
    """The prompts of a file, each with its response and its mark, if it has them.

    The response is under one of RESPONSE_NAMES. The mark is `harmful` (true or false) or `kind`
    ("harmful" or another text).
    """
    for place, row in read_rows(source):
        name = next((n for n in RESPONSE_NAMES if isinstance(row.get(n), str | list | dict)), None)
        if name is None:
            prompt, response = _prompt(row, place), None
        else:
            alone = {key: row[key] for key in row if key == name or key not in RESPONSE_NAMES}
            *prompt, last = _demonstration(alone, place)
            response = last["content"] if last["content"].strip() else None
        yield Question(Prompt.of(prompt, str(row.get("id", ""))), response, _harmful(row, place))


def _harmful(row: dict[str, Any], place: str) -> bool | None:
    mark = row.get("harmful")
    if mark is None:
        return row["kind"] == "harmful" if "kind" in row else None
    if not isinstance(mark, bool):
        raise InputError(place, "harmful", got=shown(mark), expected="true or false")
    return mark


def read_pairs(source: str) -> Iterator[Pair]:
    """Every comparison of a file, in its order. Raises InputError at the first bad row."""
    for place, row in read_rows(source):
        yield from pairs_of(row, place)


def read_rated(source: str) -> Iterator[tuple[list[Message], str, float]]:
    """(prompt, response, grade in [0, 1]) for each row of a file of single responses.

    The rows are in TRL's unpaired format: `completion`, and as `label` true, false or a number from
    0 to 1.
    """
    for place, row in read_rows(source):
        name = next((name for name in RESPONSE_NAMES if name in row), None)
        if name is None:
            raise InputError(
                place, "response", got="nothing", expected=" or ".join(RESPONSE_NAMES[:3])
            )
        label = row.get("label")
        if not isinstance(label, bool | int | float) or not 0 <= label <= 1:
            raise InputError(
                place, "label", got=shown(label), expected="true, false or a number in 0 to 1"
            )
        yield _prompt(row, place), _response(row[name], f"{place}: {name}"), float(label)


def pairs_of(row: dict[str, Any], place: str) -> Iterator[Pair]:
    """The comparisons of one row; `place` names it in errors."""
    name = str(row.get("id", ""))
    for first, second in PAIR_NAMES:
        if first in row and second in row:
            prompt = _prompt(row, place)
            texts = (_response(row[key], f"{place}: {key}") for key in (first, second))
            yield Pair(Comparison.of(prompt, *texts))
            return
    if "chosen" in row and "rejected" in row:
        prompt, chosen, rejected = _chosen_rejected(row, place)
        yield _ordered(prompt, chosen, rejected, name)
    elif "responses" in row or "completions" in row:
        yield from _ranked(row, place, name)
    else:
        raise InputError(
            place,
            "",
            got=f"keys {', '.join(sorted(row)) or 'none'}",
            expected="response_a and response_b, chosen and rejected, or responses",
        )


def _ordered(prompt: list[Message], better: str, worse: str, source: str) -> Pair:
    """A pair in an order that depends on the texts alone, so it does not reveal the choice."""
    first, second = sorted((better, worse), key=lambda text: content_id("order", text))
    comparison = Comparison.of(prompt, first, second)
    return Pair(comparison, HumanChoice(comparison.id, float(first == better), source))


def _ranked(row: dict[str, Any], place: str, source: str) -> Iterator[Pair]:
    """All pairs of K responses; `scores` (high is good) or `ranks` (1 is best) say who wins."""
    key = "responses" if "responses" in row else "completions"
    responses = row[key]
    if not isinstance(responses, list) or not 2 <= len(responses) <= MAX_RESPONSES:
        raise InputError(
            place, key, got=shown(responses), expected=f"a list of 2 to {MAX_RESPONSES} responses"
        )
    prompt = _prompt(row, place)
    texts = [_response(item, f"{place}: {key}.{n}") for n, item in enumerate(responses)]
    scores = _scores(row, responses, place)
    for a, b in combinations(range(len(texts)), 2):
        if scores is None or scores[a] == scores[b]:
            yield Pair(Comparison.of(prompt, texts[a], texts[b]))
        else:
            better, worse = (a, b) if scores[a] > scores[b] else (b, a)
            yield _ordered(prompt, texts[better], texts[worse], source)


def _scores(row: dict[str, Any], responses: list[Any], place: str) -> list[float] | None:
    for key, sign in (("scores", 1), ("ranks", -1)):
        if key in row:
            numbers = row[key]
            if (
                not isinstance(numbers, list)
                or len(numbers) != len(responses)
                or not all(map(_is_number, numbers))
            ):
                raise InputError(place, key, got=shown(numbers), expected="a number per response")
            return [sign * number for number in numbers]
    ratings = [r.get("overall_score") if isinstance(r, dict) else None for r in responses]
    return ratings if all(map(_is_number, ratings)) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _chosen_rejected(row: dict[str, Any], place: str) -> tuple[list[Message], str, str]:
    chosen, rejected = row["chosen"], row["rejected"]
    has_prompt = any(key in row for key in ("prompt", "instruction", "conversations"))
    if has_prompt:
        prompt = _prompt(row, place)
        sides = (_response(row[key], f"{place}: {key}") for key in ("chosen", "rejected"))
        return prompt, *sides
    if isinstance(chosen, str) and isinstance(rejected, str):  # HH: whole dialogues
        return _split_dialogues(chosen, rejected, place)
    talks = [_messages(row[key], f"{place}: {key}") for key in ("chosen", "rejected")]
    if len(talks[0]) < 2 or talks[0][:-1] != talks[1][:-1]:
        raise InputError(
            place, "chosen", got="conversations that differ before their last message",
            expected="a prompt, or the same messages up to the last",
        )  # fmt: skip
    return talks[0][:-1], talks[0][-1]["content"], talks[1][-1]["content"]


def _split_dialogues(chosen: str, rejected: str, place: str) -> tuple[list[Message], str, str]:
    mark = "\n\nAssistant:"
    cut = chosen.rfind(mark) + len(mark)
    if cut < len(mark) or chosen[:cut] != rejected[:cut]:
        raise InputError(
            place, "chosen", got="texts without a common dialogue",
            expected=r"a prompt, or dialogues that are the same up to the last \n\nAssistant:",
        )  # fmt: skip
    return _dialogue(chosen[:cut]), chosen[cut:].strip(), rejected[cut:].strip()


def _prompt(row: dict[str, Any], place: str) -> list[Message]:
    """The row's prompt as messages, up to where the response begins."""
    if "prompt" in row:
        key, value = "prompt", row["prompt"]
    elif "instruction" in row:
        extra = row.get("input")
        key, value = "instruction", row["instruction"]
        if isinstance(value, str) and isinstance(extra, str) and extra.strip():
            value = f"{value}\n\n{extra}"
    elif "conversations" in row:
        key, value = "conversations", row["conversations"]
    else:
        raise InputError(place, "prompt", got="nothing", expected="text or chat messages")
    if isinstance(value, str):
        return _dialogue(value)
    return _messages(value, f"{place}: {key}")


def _dialogue(text: str) -> list[Message]:
    """Text as one user message, or HH's "\\n\\nHuman: ...\\n\\nAssistant:" as its turns."""
    if not (text.startswith("\n\nHuman:") and text.rstrip().endswith("\n\nAssistant:")):
        return [{"role": "user", "content": text}]
    parts = _HH_TURN.split(text.rstrip())[1:]
    turns = zip(parts[::2], parts[1::2], strict=True)
    messages = [{"role": ROLES[who.lower()], "content": text.strip()} for who, text in turns]
    return messages[:-1]


def _messages(value: Any, where: str) -> list[Message]:
    """Chat messages as {"role", "content"} or ShareGPT's {"from", "value"}."""
    if not isinstance(value, list) or not value:
        raise InputError(where, "", got=shown(value), expected="text or chat messages")
    return [_message(item, f"{where}.{number}") for number, item in enumerate(value)]


def _message(item: Any, where: str) -> Message:
    if isinstance(item, dict):
        role = item.get("role", item.get("from"))
        content = item.get("content", item.get("value"))
        if isinstance(role, str) and role in ROLES and isinstance(content, str):
            return {"role": ROLES[role], "content": content}
    raise InputError(where, "", got=shown(item), expected="a message with role and content")


def _response(value: Any, where: str) -> str:
    """A response as text: itself, or the last message of a conversation."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):  # PandaLM's file has the answer "True" as a JSON true
        return str(value)
    if isinstance(value, dict):
        for key in ("content", "value", "text", "response"):
            if isinstance(value.get(key), str):
                return value[key]
    if isinstance(value, list) and value:
        return _messages(value, where)[-1]["content"]
    raise InputError(where, "", got=shown(value), expected="text or chat messages")


def unique(pairs: Iterable[Pair]) -> Iterator[tuple[Pair, bool]]:
    """Each pair, and whether its comparison is new in this sequence."""
    seen: set[bytes] = set()
    for pair in pairs:
        key = bytes.fromhex(pair.comparison.id)
        yield pair, key not in seen
        seen.add(key)


def read_dialogues(source: str) -> Iterator[tuple[str, list[Message]]]:
    """(place, messages up to an assistant's turn) for each demonstration in a file.

    Shapes: `prompt` (or another name for it) with one of RESPONSE_NAMES, or the whole dialogue as
    `messages`, `conversations` or one of RESPONSE_NAMES, as chat messages or as HH's text. Raises
    InputError at the first bad row.
    """
    for place, row in read_rows(source):
        messages = _demonstration(row, place)
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise InputError(
                place, "", got=f"a dialogue of {len(messages)} turns, the last one's role "
                + shown(messages[-1]["role"]), expected="a prompt and an assistant's answer to it",
            )  # fmt: skip
        if not messages[-1]["content"].strip():
            raise InputError(place, "", got="an empty last turn", expected="a response")
        yield place, messages


def _demonstration(row: dict[str, Any], place: str) -> list[Message]:
    name = next((name for name in RESPONSE_NAMES if name in row), None)
    if name is None:
        for key in ("messages", "conversations"):
            if key in row:
                return _messages(row[key], f"{place}: {key}")
        raise InputError(
            place, "", got=f"keys {', '.join(sorted(row)) or 'none'}",
            expected=f"prompt with one of {', '.join(RESPONSE_NAMES)}, or messages",
        )  # fmt: skip
    if any(key in row for key in ("prompt", "instruction", "conversations")):
        answer = _response(row[name], f"{place}: {name}")
        return [*_prompt(row, place), {"role": "assistant", "content": answer}]
    if isinstance(row[name], list):
        return _messages(row[name], f"{place}: {name}")
    text = _response(row[name], f"{place}: {name}")
    cut = text.rfind(_HH_ANSWER) + len(_HH_ANSWER)
    if cut < len(_HH_ANSWER) or not text.startswith("\n\nHuman:"):
        raise InputError(
            place, name, got="a text that is no dialogue",
            expected=r"a prompt beside it, or \n\nHuman: ... \n\nAssistant: ...",
        )  # fmt: skip
    return [*_dialogue(text[:cut]), {"role": "assistant", "content": text[cut:].strip()}]
