"""From verdicts to a label: pure arithmetic, so re-weighting or another rule costs no call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

from aif.constitution.file import Constitution, Principle
from aif.judge.judge import ORDERS
from aif.stats.odds import log_odds, probability, winner
from aif.store.records import Comparison, Label, Verdict

ROUNDING = 1e-9  # in log-odds: what is even is exactly even, thresholds hold from both sides


def label_of(
    comparison: Comparison,
    verdicts: Sequence[Verdict],
    constitution: Constitution,
    protocol: str,
    quorum: float = 1.0,
    orders: Sequence[str] | None = None,
) -> Label:
    """The label that these verdicts of one comparison come to.

    A principle counts when all of `orders` have a verdict: the protocol's (one order alone is
    position-biased), or those that were asked where it was meant to be fewer. The label is null,
    with the commonest fault, when those that count hold less than `quorum` of the weight of the
    principles that were asked.
    """
    orders = orders or ORDERS[protocol]
    if comparison.first == comparison.second:
        return Label.null(comparison.id, "identical")
    by_principle: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        by_principle[verdict.principle_id].append(verdict)
    evidence = {name: _evidence(group, orders) for name, group in by_principle.items()}
    asked = [p for p in constitution.principle if p.id in evidence]
    counted = [(p, e) for p in asked if (e := evidence[p.id]) is not None]
    fault = _fault(verdicts, asked, counted, quorum)
    return Label(
        comparison_id=comparison.id,
        p_first=None if fault else probability(_combined(counted, constitution)),
        fault=fault,
        n_verdicts=sum(verdict.p_first is not None for verdict in verdicts),
        order_agreement=_order_agreement(by_principle, evidence)
        if both_shown(orders) and len(orders) > 1
        else None,
        by_principle={
            name: None if found is None else probability(found) for name, found in evidence.items()
        },
    )


def consensus_of(
    labels: Mapping[str, Label], rule: str, weights: Mapping[str, float], quorum: float = 1.0
) -> Label:
    """The label that those of several judges of one comparison come to; each judge has a weight.

    `mean` is the mean of their log-odds. `majority` is the same over the judges of the side that
    has most weight; a tie of sides is null ("tied"), and a judge that finds both even is on
    neither. `unanimous` is null ("no_consensus") unless all are on one side. The label is also
    null, with the commonest fault, when the judges that have one hold less than `quorum` of the
    weight of those that were asked. By principle the same rule holds, over those that answered.
    """
    found = list(labels.values())
    known = {name: label for name, label in labels.items() if label.p_first is not None}
    total, held = (sum(weights[name] for name in names) for names in (labels, known))
    if held and held >= quorum * total * (1 - 1e-9):
        votes = [(weights[name], label.p_first) for name, label in known.items()]
        p_first, fault = _agreed(votes, rule)
    else:
        faults = sorted(label.fault for label in found if label.fault)
        p_first, fault = None, max(faults, key=faults.count) if faults else "unparsed"
    names = dict.fromkeys(name for label in found for name in label.by_principle)
    orders = [label.order_agreement for label in found if label.order_agreement is not None]
    return Label(
        comparison_id=found[0].comparison_id,
        p_first=p_first,
        fault=fault,
        n_verdicts=sum(label.n_verdicts for label in found),
        order_agreement=fmean(orders) if orders else None,
        by_principle={
            name: _agreed(
                [
                    (weights[judge], p)
                    for judge, label in labels.items()
                    if (p := label.by_principle.get(name)) is not None
                ],
                rule,
            )[0]
            for name in names
        },
        by_judge={name: label.p_first for name, label in labels.items()},
    )


def _agreed(votes: Sequence[tuple[float, float]], rule: str) -> tuple[float | None, str | None]:
    """(p_first, fault) of votes, each a weight and a p_first: one of the two is None."""
    votes = [vote for vote in votes if vote[0]]
    if not votes:
        return None, "unparsed"
    sides = {winner(p) for _, p in votes}
    if rule == "unanimous" and len(sides) > 1:
        return None, "no_consensus"
    if rule == "majority" and len(sides) > 1:
        lead = _settled(sum(weight * winner(p) for weight, p in votes))
        if not lead:
            return None, "tied"
        votes = [(weight, p) for weight, p in votes if winner(p) * lead > 0]
    if len(votes) == 1:
        return votes[0][1], None  # as it stands: log-odds and back would round it
    total = sum(weight for weight, _ in votes)
    mean = sum(weight * log_odds(p) for weight, p in votes) / total
    return probability(_settled(mean)), None


def both_shown(orders: Sequence[str]) -> bool:
    """Whether these are orders of two responses, rather than of one that is graded alone."""
    return len(orders[0]) == 2


def _evidence(verdicts: Sequence[Verdict], orders: Sequence[str]) -> float | None:
    """Log-odds that the first response wins under one principle; None if an order is missing."""
    found = [log_odds(v.p_first) for v in verdicts if v.p_first is not None]
    if len(found) < len(orders):
        return None
    # pairwise: half the difference of log-odds in the two orders, as both speak of the first
    # response here. pointwise: the difference of two grades is the log-odds of the comparison
    # (Bradley-Terry with the grade's log-odds as strength).
    return _settled(sum(found) / len(orders) if both_shown(orders) else sum(found))


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
        len({winner(v.p_first) for v in by_principle[name] if v.p_first is not None}) == 1
        for name, found in evidence.items()
        if found is not None
    ]
    return sum(agree) / len(agree) if agree else None
