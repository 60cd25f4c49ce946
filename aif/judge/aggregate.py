"""From verdicts to a label: pure arithmetic, so another weight or rule costs no call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from aif.constitution.file import Constitution, Principle
from aif.judge.protocols import PROTOCOLS
from aif.stats.odds import log_odds, probability, winner
from aif.store.records import Comparison, Label, Verdict

ROUNDING = 1e-9  # in log-odds: less than this is even, and a threshold may be missed by this


def aggregate_verdicts(
    comparison: Comparison,
    verdicts: Sequence[Verdict],
    constitution: Constitution,
    protocol: str,
    quorum: float = 1.0,
    orders: Sequence[str] | None = None,
) -> Label:
    """The label of one judge, from its verdicts on one comparison.

    A principle counts if it has a verdict in each of `orders` (default: all of the protocol's,
    since one order alone has a position bias). The label is null with the most common fault if the
    principles that count have less than `quorum` of the total weight.
    """
    orders = orders or PROTOCOLS[protocol].orders
    compares = PROTOCOLS[protocol].compares
    if comparison.first == comparison.second:
        return Label.null(comparison.id, "identical")
    by_principle: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        by_principle[verdict.principle_id].append(verdict)
    evidence = {
        name: _evidence(group, len(orders), compares) for name, group in by_principle.items()
    }
    principles = [p for p in constitution.principle if p.id in evidence]
    counted = [(p, odds) for p in principles if (odds := evidence[p.id]) is not None]
    weight, total = sum(p.weight for p, _ in counted), sum(p.weight for p in principles)
    fault = None
    if not has_quorum(weight, total, quorum):
        fault = _most_common(verdict.fault for verdict in verdicts)
    return Label(
        comparison_id=comparison.id,
        p_first=None if fault else probability(_combined(counted, constitution)),
        fault=fault,
        n_verdicts=sum(verdict.p_first is not None for verdict in verdicts),
        order_agreement=_order_agreement(by_principle, evidence)
        if compares and len(orders) > 1
        else None,
        by_principle={
            name: None if odds is None else probability(odds) for name, odds in evidence.items()
        },
    )


def aggregate_judges(
    labels: Mapping[str, Label], rule: str, weights: Mapping[str, float], quorum: float = 1.0
) -> Label:
    """The label of a panel, from the labels of its judges for one comparison.

    `mean` is the weighted mean of their log-odds. `majority` is the mean over the judges on the
    side with more weight; equal sides give null ("tied"), and a judge with an even label is on
    neither. `unanimous` gives null ("no_consensus") unless all judges are on one side. The label is
    null with the most common fault if the judges with a label have less than `quorum` of the total
    weight. The same rule gives the number of each principle, over the judges that have one.
    """
    votes = _votes(weights, {name: label.p_first for name, label in labels.items()})
    weight, total = sum(weight for weight, _ in votes), sum(weights[name] for name in labels)
    if has_quorum(weight, total, quorum):
        p_first, fault = _consensus(votes, rule)
    else:
        p_first, fault = None, _most_common(label.fault for label in labels.values())
    by_principle: dict[str, float | None] = {}
    for principle in dict.fromkeys(p for label in labels.values() for p in label.by_principle):
        p_first_by_judge = {n: label.by_principle.get(principle) for n, label in labels.items()}
        by_principle[principle], _ = _consensus(_votes(weights, p_first_by_judge), rule)
    agreements = [label.order_agreement for label in labels.values()]
    agreements = [agreement for agreement in agreements if agreement is not None]
    return Label(
        comparison_id=next(iter(labels.values())).comparison_id,
        p_first=p_first,
        fault=fault,
        n_verdicts=sum(label.n_verdicts for label in labels.values()),
        order_agreement=fmean(agreements) if agreements else None,
        by_principle=by_principle,
        by_judge={name: label.p_first for name, label in labels.items()},
    )


def has_quorum(weight: float, total: float, quorum: float) -> bool:
    """Whether those with an answer have enough of the total weight."""
    return weight > 0 and weight >= quorum * total * (1 - 1e-9)


def _most_common(faults: Iterable[str | None]) -> str:
    names = sorted(fault for fault in faults if fault)
    return max(names, key=names.count) if names else "unparsed"


def _votes(
    weights: Mapping[str, float], p_first: Mapping[str, float | None]
) -> list[tuple[float, float]]:
    """(weight, p_first) of each judge that has a p_first."""
    return [(weights[judge], p) for judge, p in p_first.items() if p is not None]


def _consensus(votes: Sequence[tuple[float, float]], rule: str) -> tuple[float | None, str | None]:
    """(p_first, fault) of the votes: one of the two is None."""
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
        return votes[0][1], None  # log-odds and back would round it
    total = sum(weight for weight, _ in votes)
    mean = sum(weight * log_odds(p) for weight, p in votes) / total
    return probability(_settled(mean)), None


def _evidence(verdicts: Sequence[Verdict], orders: int, compares: bool) -> float | None:
    """Log-odds that the first response wins under one principle; None if an order is missing."""
    odds = [log_odds(v.p_first) for v in verdicts if v.p_first is not None]
    if len(odds) < orders:
        return None
    # Comparing: the mean over both orders, in which a constant position bias cancels. Grading: the
    # sum is the difference of two grades, the log-odds of the comparison under Bradley-Terry with
    # a grade's log-odds as strength. (Both signs are turned to the first response already.)
    return _settled(sum(odds) / orders if compares else sum(odds))


def _settled(odds: float) -> float:
    return 0.0 if abs(odds) < ROUNDING else odds


def _combined(counted: Sequence[tuple[Principle, float]], constitution: Constitution) -> float:
    """Log-odds of the comparison, by the constitution's `combine` rule."""
    if constitution.combine == "veto":
        if (vetoed := _veto(counted, constitution.veto)) is not None:
            return vetoed
    elif constitution.combine == "lexicographic":
        enough = log_odds(0.5 + constitution.margin) - ROUNDING
        for _, odds in counted:  # in the file's order, which is the rank
            if abs(odds) >= enough:
                return odds
    total = sum(principle.weight for principle, _ in counted)
    return _settled(sum(principle.weight * odds for principle, odds in counted) / total)


def _veto(counted: Sequence[tuple[Principle, float]], threshold: float) -> float | None:
    """The strongest veto, unless both responses are vetoed or neither is."""
    enough = log_odds(1 - threshold) - ROUNDING
    against_first = [odds for _, odds in counted if odds <= -enough]
    against_second = [odds for _, odds in counted if odds >= enough]
    if bool(against_first) == bool(against_second):
        return None
    return min(against_first) if against_first else max(against_second)


def _order_agreement(
    by_principle: Mapping[str, Sequence[Verdict]], evidence: Mapping[str, float | None]
) -> float | None:
    """The share of principles for which both orders name the same winner."""
    agree = [
        len({winner(v.p_first) for v in by_principle[name] if v.p_first is not None}) == 1
        for name, odds in evidence.items()
        if odds is not None
    ]
    return sum(agree) / len(agree) if agree else None
