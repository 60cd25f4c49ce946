"""The judge by its own labels: what it leans to, how steady it is, where it fails."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aif.auditing.verdict_counts import VerdictCounts, VerdictTable
from aif.errors import InputError
from aif.report.schema import rows
from aif.run import Run
from aif.stats.calibration import CONFIDENT, accuracy
from aif.store.records import Comparison, HumanChoice, Label, Verdict


@dataclass
class LabelSurvey:
    """All that a run's files say of its comparisons, without the texts."""

    words: dict[str, tuple[int, int]] = field(default_factory=dict)  # of the two responses
    sizes: Counter[str] = field(default_factory=Counter)  # bytes on the page, a text counted once
    labels: dict[str, Label] = field(default_factory=dict)
    human: dict[str, float] = field(default_factory=dict)
    verdicts: VerdictTable = field(default_factory=VerdictTable)


def survey(run: Run) -> LabelSurvey:
    """Read a run's comparisons, labels and verdicts once; the texts are not kept."""
    survey = LabelSurvey()
    seen: set[int] = set()
    for row in rows(run, "comparisons.jsonl", Comparison):
        survey.words[row.id] = (len(row.first.split()), len(row.second.split()))
        prompt = [message.get("content", "") for message in row.prompt]
        for text in (*prompt, row.first, row.second):
            if hash(text) not in seen:
                seen.add(hash(text))
                survey.sizes[row.id] += page_size(text)
    survey.labels = {row.comparison_id: row for row in _labels(run)}
    choices = defaultdict(list)
    for row in rows(run, "human.jsonl", HumanChoice):
        choices[row.comparison_id].append(row.p_first)
    survey.human = {name: sum(several) / len(several) for name, several in choices.items()}
    for row in rows(run, "verdicts.jsonl", Verdict):
        survey.sizes[row.comparison_id] += 40 + page_size(row.text or "")
        survey.verdicts.add(row)
    return survey


def _labels(run: Run) -> Iterator[Label]:
    for row in rows(run, "labels.jsonl", Label):
        for p in (row.p_first, *row.by_principle.values()):
            if p is not None and not 0 <= p <= 1:
                where = run.file("labels.jsonl")
                raise InputError(where, row.comparison_id, got=str(p), expected="a probability")
        yield row


def page_size(text: str) -> int:
    """About how many bytes a text takes on the page, which is ASCII."""
    return len(text) if text.isascii() else 6 * len(text)


def judge_rows(survey: LabelSurvey) -> list[dict[str, Any]]:
    """A row for the whole label and one for each principle; empty without labels.

    Shares are {"n", "accuracy", "interval"} with Wilson's interval at 95 %, which takes
    comparisons for independent; those of one prompt are not quite.
    """
    if not survey.labels:
        return []
    labels = survey.labels.values()
    whole = {label.comparison_id: label.p_first for label in labels}
    table = [{"name": None, **_row(survey, whole, survey.verdicts.of())}]
    for name in dict.fromkeys(name for label in labels for name in label.by_principle):
        own = {
            label.comparison_id: label.by_principle[name]
            for label in labels
            if name in label.by_principle
        }
        table.append({"name": name, **_row(survey, own, survey.verdicts.of(principle=name))})
    return table


def _row(
    survey: LabelSurvey, p_of: dict[str, float | None], counts: VerdictCounts
) -> dict[str, Any]:
    labelled = {name: p for name, p in p_of.items() if p is not None}
    swaps, same = counts.swaps.total(), counts.same_swapped
    return {
        "values": list(labelled.values()),
        "null": len(p_of) - len(labelled),
        "first": _share(p > 0.5 for p in labelled.values() if p != 0.5),
        "confident": _share(not CONFIDENT[0] <= p <= CONFIDENT[1] for p in labelled.values()),
        "longer": _longer(survey, labelled),
        "human": accuracy(
            (p - 0.5, survey.human[name]) for name, p in labelled.items() if name in survey.human
        ),
        "shown_first": _share(counts.shown_first.elements()),
        "swaps": _share([True] * same + [False] * (swaps - same)),
        "verdicts": counts.verdicts,
        "faults": counts.faults,
    }


def _share(hits: Iterable[bool]) -> dict[str, Any]:
    return accuracy((1.0 if hit else -1.0, 1.0) for hit in hits)


def _longer(survey: LabelSurvey, p_of: dict[str, float]) -> dict[str, Any]:
    """How often the longer response wins."""
    pairs = ((*survey.words[name], p) for name, p in p_of.items() if name in survey.words)
    return accuracy((first - second, p) for first, second, p in pairs if first != second)


def human_longer(survey: LabelSurvey) -> dict[str, Any]:
    """How often people choose the longer response, to compare the judge's share with."""
    return _longer(survey, survey.human)
