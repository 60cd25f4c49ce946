"""The calls behind verdicts: a grade that several comparisons share was paid once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from aif.store.records import Verdict


@dataclass
class Paid:
    """How many calls verdicts come from, and the tokens of these."""

    calls: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    _grades: set[str] = field(default_factory=set)  # alone: no two comparisons share other calls

    def add(self, verdict: Verdict) -> None:
        """Count the call of a verdict, if it is none that was counted."""
        if len(verdict.order) == 1:
            if verdict.id in self._grades:
                return
            self._grades.add(verdict.id)
        self.calls += 1
        self.tokens.update(verdict.usage)
