"""The data of a reward model: comparisons with their labels, grouped by prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations

from aif.store.records import Comparison, Message
from aif.train.examples import split_key


@dataclass(frozen=True, slots=True)
class LabeledComparison:
    """A comparison with its AI label and a person's choice, each if there is one."""

    comparison: Comparison
    p_first: float | None = None  # of the AI label
    by_principle: Mapping[str, float | None] = field(default_factory=dict)
    p_human: float | None = None

    @property
    def target(self) -> float | None:
        """The probability that is learned: the AI label's, or else the person's."""
        return self.p_human if self.p_first is None else self.p_first


@dataclass(slots=True)
class PromptGroup:
    """A prompt, the distinct responses to it, and their labels: comparisons or grades."""

    prompt: list[Message]
    source: str
    responses: list[str] = field(default_factory=list)
    comparisons: list[LabeledComparison] = field(default_factory=list)
    grades: list[float] = field(default_factory=list)  # probability that each response is good

    @property
    def split_key(self) -> str:
        return split_key(self.prompt)

    def add(self, row: LabeledComparison) -> None:
        """Add a comparison of this prompt's; each text is kept once."""
        places = self.place(row.comparison.first), self.place(row.comparison.second)
        first, second = (self.responses[place] for place in places)
        comparison = replace(row.comparison, prompt=self.prompt, first=first, second=second)
        self.comparisons.append(replace(row, comparison=comparison))

    def place(self, text: str) -> int:
        """The number of a response, which joins the others if it is new."""
        if text not in self.responses:
            self.responses.append(text)
        return self.responses.index(text)

    def labels(self) -> dict[str, list]:
        """The labels as `prefix_groups.SharedPrefix` has them, a response by its number."""
        return {
            "first": [self.place(row.comparison.first) for row in self.comparisons],
            "second": [self.place(row.comparison.second) for row in self.comparisons],
            "p_first": [row.target for row in self.comparisons],
            "grades": self.grades,
        }

    def compared(self) -> list[LabeledComparison]:
        """The comparisons, or else every pair of graded responses; the better grade should win."""
        if not self.grades:
            return self.comparisons
        labeler = "p_first" if self.source == "labels" else "p_human"
        return [
            LabeledComparison(
                Comparison.of(self.prompt, self.responses[a], self.responses[b]),
                **{labeler: (1 + self.grades[a] - self.grades[b]) / 2},
            )
            for a, b in combinations(range(len(self.responses)), 2)
        ]
