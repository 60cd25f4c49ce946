"""Comparisons with everything that is known of them, and what a reward model says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from aif.run import Run
from aif.store.records import Comparison, HumanChoice, Label, content_id
from aif.train.reward.card import ScoredPair
from aif.train.reward.data import PromptGroup
from aif.train.reward.model import Ensemble


@dataclass(frozen=True, slots=True)
class LabeledComparison:
    """A comparison, the AI label of it and a person's choice, each as far as there is one."""

    comparison: Comparison
    p_first: float | None = None
    by_principle: Mapping[str, float | None] = field(default_factory=dict)
    p_human: float | None = None


def labeled_comparisons(run: Run, groups: Iterable[PromptGroup]) -> Iterator[LabeledComparison]:
    """The comparisons of groups: labels of the run's own ones, people's choices where it has any,
    and the choices of other sources."""
    labels = {row.comparison_id: row for row in _rows(run, "labels.jsonl", Label)}
    people = {row.comparison_id: row.p_first for row in _rows(run, "human.jsonl", HumanChoice)}
    for group in groups:
        own = group.source == "labels"
        for pair in group.pairs:
            texts = group.responses[pair.first], group.responses[pair.second]
            prompt_id = content_id("prompt", group.prompt)
            comparison = Comparison(pair.comparison_id, prompt_id, group.prompt, *texts)
            label = labels.get(pair.comparison_id) if own else None
            yield LabeledComparison(
                comparison,
                pair.p_first if own else None,
                label.by_principle if label else {},
                people.get(pair.comparison_id) if own else pair.p_first,
            )
        yield from _by_grade(group)


def _by_grade(group: PromptGroup) -> Iterator[LabeledComparison]:
    """Graded responses to one prompt, each with each: the better grade is to win."""
    if group.grades:
        who = "p_first" if group.source == "labels" else "p_human"
        for a, b in combinations(range(len(group.responses)), 2):
            comparison = Comparison.of(group.prompt, group.responses[a], group.responses[b])
            yield LabeledComparison(
                comparison, **{who: (1 + group.grades[a] - group.grades[b]) / 2}
            )


def scored_pairs(ensemble: Ensemble, known: Sequence[LabeledComparison]) -> list[ScoredPair]:
    """What the reward model says of each; left out are pairs that do not fit into it."""
    texts: dict[str, dict[str, None]] = {}
    prompts = {}
    for row in known:
        comparison = row.comparison
        prompts[comparison.prompt_id] = comparison.prompt
        texts.setdefault(comparison.prompt_id, {}).update(
            {comparison.first: None, comparison.second: None}
        )
    groups = [(prompts[key], list(found)) for key, found in texts.items()]
    scores = {
        (key, text): score
        for key, (_, found), row in zip(texts, groups, ensemble.scores(groups), strict=True)
        for text, score in zip(found, row, strict=True)
    }
    pairs = []
    for row in known:
        key = row.comparison.prompt_id
        first, second = (scores[key, t] for t in (row.comparison.first, row.comparison.second))
        if first is not None and second is not None:
            pairs.append(
                ScoredPair(
                    row.comparison.id, key, first, second,
                    len(row.comparison.first.split()), len(row.comparison.second.split()),
                    row.p_first, row.by_principle, row.p_human,
                )
            )  # fmt: skip
    return pairs


def _rows(run: Run, name: str, kind: type[Any]) -> Iterator[Any]:
    return run.read(name, kind) if run.file(name).exists() else iter(())
