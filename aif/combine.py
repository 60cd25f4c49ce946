"""From verdicts to a label: pure arithmetic, so re-weighting or another rule costs no call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from aif.constitution import Constitution, Principle
from aif.judge import ORDERS
from aif.odds import log_odds, probability
from aif.records import Comparison, Label, Verdict

ROUNDING = 1e-9  # in log-odds: what is even is exactly even, thresholds hold from both sides


def label_of(
    comparison: Comparison,
    verdicts: Sequence[Verdict],
    constitution: Constitution,
    protocol: str,
    quorum: float = 1.0,
) -> Label:
    """The label that these verdicts of one comparison come to.

    A principle counts when all its orders have a verdict (one order alone is position-biased).
    The label is null, with the commonest fault, when those that count hold less than `quorum` of
    the weight of the principles that were asked.
    """
    if comparison.first == comparison.second:
        return Label(comparison.id, None, "identical", 0, None)
    by_principle: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        by_principle[verdict.principle_id].append(verdict)
    evidence = {name: _evidence(group, protocol) for name, group in by_principle.items()}
    asked = [p for p in constitution.principle if p.id in evidence]
    counted = [(p, e) for p in asked if (e := evidence[p.id]) is not None]
    fault = _fault(verdicts, asked, counted, quorum)
    return Label(
        comparison_id=comparison.id,
        p_first=None if fault else probability(_combined(counted, constitution)),
        fault=fault,
        n_verdicts=sum(verdict.p_first is not None for verdict in verdicts),
        order_agreement=_order_agreement(by_principle, evidence)
        if protocol == "pairwise"
        else None,
        by_principle={
            name: None if found is None else probability(found) for name, found in evidence.items()
        },
    )


def _evidence(verdicts: Sequence[Verdict], protocol: str) -> float | None:
    """Log-odds that the first response wins under one principle; None if an order is missing."""
    found = [log_odds(v.p_first) for v in verdicts if v.p_first is not None]
    if len(found) < len(ORDERS[protocol]):
        return None
    # pairwise: half the difference of log-odds in the two orders, as both speak of the first
    # response here. pointwise: the difference of two grades is the log-odds of the comparison
    # (Bradley-Terry with the grade's log-odds as strength).
    return _settled(sum(found) / 2 if protocol == "pairwise" else sum(found))


def _settled(found: float) -> float:
    return 0.0 if abs(found) < ROUNDING else found


def _fault(
    verdicts: Sequence[Verdict],
    asked: Sequence[Principle],
    counted: Sequence[tuple[Principle, float]],
    quorum: float,
) -> str | None:
    total = sum(principle.weight for principle in asked)
    held = sum(principle.weight for principle, _ in counted)
    if counted and held >= quorum * total * (1 - 1e-9):
        return None
    faults = sorted(verdict.fault for verdict in verdicts if verdict.fault)
    return max(faults, key=faults.count) if faults else "unparsed"


def _combined(counted: Sequence[tuple[Principle, float]], constitution: Constitution) -> float:
    if constitution.combine == "veto":
        if (vetoed := _veto(counted, constitution.veto)) is not None:
            return vetoed
    elif constitution.combine == "lexicographic":
        enough = log_odds(0.5 + constitution.margin) - ROUNDING
        for _, found in counted:  # the file's order is the order of rank
            if abs(found) >= enough:
                return found
    weight = sum(principle.weight for principle, _ in counted)
    return _settled(sum(principle.weight * found for principle, found in counted) / weight)


def _veto(counted: Sequence[tuple[Principle, float]], threshold: float) -> float | None:
    """The strongest veto, unless both responses are vetoed or neither is."""
    enough = log_odds(1 - threshold) - ROUNDING
    against_first = [found for _, found in counted if found <= -enough]
    against_second = [found for _, found in counted if found >= enough]
    if bool(against_first) == bool(against_second):
        return None
    return min(against_first) if against_first else max(against_second)


def _order_agreement(
    by_principle: dict[str, list[Verdict]], evidence: dict[str, float | None]
) -> float | None:
    agree = [
        len({_winner(v.p_first) for v in by_principle[name] if v.p_first is not None}) == 1
        for name, found in evidence.items()
        if found is not None
    ]
    return sum(agree) / len(agree) if agree else None


def _winner(p_first: float) -> int:
    """1: the first, -1: the second, 0: neither."""
    return (p_first > 0.5) - (p_first < 0.5)
