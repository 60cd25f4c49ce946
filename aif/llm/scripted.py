"""The fake: answers from rules, for tests and for trying things out at no cost.

    --judge scripted:rules.jsonl

A rule is {"match": REGEX, "text": "A"} or {"match": REGEX, "logprobs": {"A": -0.1, "B": -2.3}};
the first whose regex matches somewhere in the ask answers it. {"fault": "refused"} is an answer,
too. If the ask reads the end of the text, the log-probabilities are for its verdict.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from aif.errors import InputError, shown
from aif.llm import LLM, Answer, Ask
from aif.store import jsonl

Reply = Callable[[Ask], Answer]


class ScriptedLLM(LLM):
    """An LLM whose answers are a function of the ask. It keeps every ask in `asks`."""

    def __init__(self, reply: Reply):
        self._reply = reply
        self.asks: list[Ask] = []

    @classmethod
    def from_file(cls, path: str) -> ScriptedLLM:
        """From a JSONL file of rules."""
        rules = [_rule(row, f"{path}:{number}") for number, row in jsonl.read(Path(path))]

        def reply(ask: Ask) -> Answer:
            prompt = words(ask)
            for pattern, answer in rules:
                if pattern.search(prompt):
                    return answer
            return Answer("", fault="unparsed", detail="no rule matches")

        return cls(reply)

    def answer(self, asks: Iterable[Ask]) -> Iterator[Answer]:
        for ask in asks:
            self.asks.append(ask)
            answer = replace(self._reply(ask).cut(ask), key=ask.key)
            if ask.reads_the_end and answer.logprobs is not None:
                ends = (answer.logprobs,) * len(answer.texts)
                answer = replace(answer, logprobs=None, ends=ends)
            yield answer

    def count_tokens(self, asks: Iterable[Ask]) -> tuple[int, bool]:
        return sum(len(words(ask).split()) for ask in asks), True


def words(ask: Ask) -> str:
    """The texts of an ask as one."""
    return "\n".join(ask.texts)


def _rule(row: dict, where: str) -> tuple[re.Pattern[str], Answer]:
    try:
        pattern = re.compile(row.get("match", ""), re.DOTALL)
    except (re.error, TypeError):
        raise InputError(where, "match", got=shown(row["match"]), expected="a regex") from None
    text = row.get("text")
    if text is None and "logprobs" not in row and "fault" not in row:
        raise InputError(where, "", got=shown(row), expected="text, logprobs or fault")
    return pattern, Answer(
        key="",
        texts=() if text is None else (text,),
        finish="stop",
        logprobs=row.get("logprobs"),
        fault=row.get("fault"),
    )
