"""The judge as its own labels show it: what it leans to, how steady it is, where it fails."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aif.errors import InputError
from aif.llm.usage import Paid
from aif.report.schema import rows
from aif.run import Run
from aif.stats.calibration import CONFIDENT, accuracy
from aif.stats.odds import winner
from aif.store.records import Comparison, HumanChoice, Label, Message, Verdict

PAIRWISE = ("ab", "ba")


@dataclass
class Tally:
    """What the verdicts under one principle come to."""

    verdicts: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    shown_first: Counter[bool] = field(default_factory=Counter)  # did that response win
    swaps: Counter[bool] = field(default_factory=Counter)  # did both orders name one winner


@dataclass
class Judged:
    """All that is known of comparisons, but for their texts."""

    words: dict[str, tuple[int, int]] = field(default_factory=dict)  # of the two responses
    sizes: Counter[str] = field(default_factory=Counter)  # characters, a text counted once
    labels: dict[str, Label] = field(default_factory=dict)
    human: dict[str, float] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    tokens: Counter[str] = field(default_factory=Counter)

    @property
    def verdicts(self) -> int:
        return sum(tally.verdicts for tally in self.tallies.values())

    @property
    def faults(self) -> Counter[str]:
        return sum((tally.faults for tally in self.tallies.values()), Counter())


def survey(run: Run) -> Judged:
    """Read a run's comparisons, labels and verdicts once; the texts are not kept."""
    judged = Judged()
    seen: set[int] = set()
    for row in rows(run, "comparisons.jsonl", Comparison):
        judged.words[row.id] = (len(row.first.split()), len(row.second.split()))
        for text in (*contents(row.prompt), row.first, row.second):
            if hash(text) not in seen:
                seen.add(hash(text))
                judged.sizes[row.id] += page_size(text)
    judged.labels = {row.comparison_id: row for row in _labels(run)}
    choices = defaultdict(list)
    for row in rows(run, "human.jsonl", HumanChoice):
        choices[row.comparison_id].append(row.p_first)
    judged.human = {name: sum(found) / len(found) for name, found in choices.items()}
    _read_verdicts(run, judged)
    return judged


def _labels(run: Run) -> Iterator[Label]:
    for row in rows(run, "labels.jsonl", Label):
        for p in (row.p_first, *row.by_principle.values()):
            if p is not None and not 0 <= p <= 1:
                where = run.file("labels.jsonl")
                raise InputError(where, row.comparison_id, got=str(p), expected="a probability")
        yield row


def _read_verdicts(run: Run, judged: Judged) -> None:
    other: dict[tuple[str, str, str], float] = {}  # p_first of one order till the other
    paid = Paid()
    for row in rows(run, "verdicts.jsonl", Verdict):
        tally = judged.tallies[row.principle_id]
        tally.verdicts += 1
        judged.sizes[row.comparison_id] += 40 + page_size(row.text or "")
        paid.add(row)
        if row.fault or row.p_first is None:
            tally.faults[row.fault or "null"] += 1
        elif row.order in PAIRWISE:
            if row.p_first != 0.5:
                tally.shown_first[(row.p_first > 0.5) == (row.order == "ab")] += 1
            key = row.comparison_id, row.principle_id, row.judge
            if (before := other.pop(key, None)) is None:
                other[key] = row.p_first
            else:
                tally.swaps[winner(before) == winner(row.p_first)] += 1
    judged.tokens = paid.tokens


def contents(messages: Iterable[Message]) -> list[str]:
    """The texts of a conversation."""
    return [message.get("content", "") for message in messages]


def page_size(text: str) -> int:
    """About how many bytes a text takes on the page, which is ASCII."""
    return len(text) if text.isascii() else 6 * len(text)


def judge_card(judged: Judged) -> list[dict[str, Any]]:
    """A row for the whole label and one for each principle; empty without labels.

    Shares are {"n", "accuracy", "interval"} with Wilson's interval at 95 %, which takes
    comparisons for independent; those of one prompt are not quite.
    """
    if not judged.labels:
        return []
    labels = judged.labels.values()
    names = dict.fromkeys(name for label in labels for name in label.by_principle)
    whole = {label.comparison_id: label.p_first for label in labels}
    every = Tally()
    for tally in judged.tallies.values():
        every.verdicts += tally.verdicts
        every.faults += tally.faults
        every.shown_first += tally.shown_first
        every.swaps += tally.swaps
    found = [{"name": None, **_row(judged, whole, every)}]
    for name in names:
        own = {
            label.comparison_id: label.by_principle[name]
            for label in labels
            if name in label.by_principle
        }
        found.append({"name": name, **_row(judged, own, judged.tallies.get(name, Tally()))})
    return found


def _row(judged: Judged, p_of: dict[str, float | None], tally: Tally) -> dict[str, Any]:
    known = {name: p for name, p in p_of.items() if p is not None}
    words = {name: judged.words[name] for name in known if name in judged.words}
    return {
        "values": list(known.values()),
        "null": len(p_of) - len(known),
        "first": _share(p > 0.5 for p in known.values() if p != 0.5),
        "confident": _share(not CONFIDENT[0] <= p <= CONFIDENT[1] for p in known.values()),
        "longer": accuracy(
            (first - second, known[name])
            for name, (first, second) in words.items()
            if first != second
        ),
        "human": accuracy(
            (known[name] - 0.5, judged.human[name]) for name in known if name in judged.human
        ),
        "shown_first": _share(tally.shown_first.elements()),
        "swaps": _share(tally.swaps.elements()),
        "verdicts": tally.verdicts,
        "faults": tally.faults,
    }


def _share(hits: Iterable[bool]) -> dict[str, Any]:
    return accuracy((1.0 if hit else -1.0, 1.0) for hit in hits)


def human_longer(judged: Judged) -> dict[str, Any]:
    """How often people choose the longer response, to hold the judge's own share against."""
    known = ((judged.words[name], p) for name, p in judged.human.items() if name in judged.words)
    return accuracy((first - second, p) for (first, second), p in known if first != second)
