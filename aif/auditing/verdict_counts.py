"""Counts of a judge's verdicts: faults, and the effect of the order of the two responses."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from aif.llm.usage import Paid
from aif.stats.odds import outcome
from aif.store.records import Verdict

BOTH = ("ab", "ba")


@dataclass
class VerdictCounts:
    """Verdicts under one principle on the pairs of one subset."""

    verdicts: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    shown_first: Counter[bool] = field(default_factory=Counter)  # whether that response won
    swaps: Counter[tuple[float, float]] = field(default_factory=Counter)  # outcomes of ab and ba
    right: Counter[tuple[str, bool]] = field(default_factory=Counter)  # by order, as people say

    def add(self, other: VerdictCounts) -> None:
        """Add other counts to these."""
        self.verdicts += other.verdicts
        for name in ("faults", "shown_first", "swaps", "right"):
            getattr(self, name).update(getattr(other, name))

    @property
    def same_swapped(self) -> int:
        """Pairs of verdicts in both orders with the same outcome."""
        return sum(times for (ab, ba), times in self.swaps.items() if ab == ba)


class VerdictTable:
    """All verdicts of a judge, counted by principle and subset."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str | None], VerdictCounts] = defaultdict(VerdictCounts)
        self.paid = Paid()
        self._first: dict[tuple[str, str, str], Verdict] = {}  # until the other order comes

    def add(self, verdict: Verdict, people: float | None = None, subset: str | None = None) -> None:
        """Count a verdict. `people` is 1.0 where people prefer the first response of its pair."""
        counts = self.counts[verdict.principle_id, subset]
        counts.verdicts += 1
        self.paid.add(verdict)
        winner = outcome(verdict.p_first)
        if winner is None:
            counts.faults[verdict.fault or "null"] += 1
        if verdict.order not in BOTH:
            return
        if people not in (None, 0.5):
            counts.right[verdict.order, winner == people] += 1
        if winner in (0.0, 1.0):
            counts.shown_first[(winner == 1) == (verdict.order == "ab")] += 1
        key = verdict.comparison_id, verdict.principle_id, verdict.judge
        before = self._first.pop(key, None)
        if before is None:
            self._first[key] = verdict
        elif winner is not None and before.p_first is not None:
            ab, ba = sorted((before, verdict), key=lambda v: v.order)
            counts.swaps[outcome(ab.p_first), outcome(ba.p_first)] += 1

    def of(self, principle: str | None = None, subset: str | None = None) -> VerdictCounts:
        """The sum over one principle and one subset; None is all of them."""
        total = VerdictCounts()
        for (its_principle, its_subset), counts in self.counts.items():
            if principle in (None, its_principle) and subset in (None, its_subset):
                total.add(counts)
        return total
