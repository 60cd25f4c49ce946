"""The calls behind verdicts: a grade that several comparisons share is one call, paid once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from aif.store.records import Verdict

USAGE = ("prompt_tokens", "completion_tokens")  # the keys of `Answer.usage`


@dataclass
class Paid:
    """The number of calls behind verdicts, and their tokens."""

    calls: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    _grades: set[str] = field(default_factory=set)  # ids; comparisons share no other calls

    def add(self, verdict: Verdict) -> None:
        """Count the call of a verdict, unless it has been counted."""
        if len(verdict.order) == 1:
            if verdict.id in self._grades:
                return
            self._grades.add(verdict.id)
        self.calls += 1
        self.tokens.update(verdict.usage)
