"""A judge's card: how far it can be trusted, by what it said of pairs that people have judged.

Made of labels and verdicts alone, whoever gave them and when, so it costs no call. Figures are over
all pairs, by principle and by subset; each has its count, and a null is in none but the counts.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aif.data.human import Item
from aif.llm.usage import Paid
from aif.stats.agreement import (
    agreement,
    at_equal_length,
    longer_wins,
    self_preference,
    temperature,
)
from aif.stats.calibration import calibration
from aif.stats.intervals import Bootstrap
from aif.stats.odds import Value, log_odds, outcome
from aif.store.records import Label, Verdict, content_id

BOTH = ("ab", "ba")
SEVERAL = 2  # subsets from which on they are told apart


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge came to on an item; `label` is None where it has not been asked."""

    item: Item
    label: Label | None


@dataclass
class Tally:
    """Verdicts under one principle on the items of one subset."""

    verdicts: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    shown_first: Counter[bool] = field(default_factory=Counter)  # did that response win
    swaps: Counter[tuple[float, float]] = field(default_factory=Counter)  # outcomes of ab and ba
    right: Counter[tuple[str, bool]] = field(default_factory=Counter)  # by order, as people say
    graded: int = 0  # verdicts on one response by itself

    def add(self, other: Tally) -> None:
        """Take another tally into this one."""
        self.verdicts += other.verdicts
        self.graded += other.graded
        for name in ("faults", "shown_first", "swaps", "right"):
            getattr(self, name).update(getattr(other, name))


class Tallies:
    """All verdicts of a judge, told apart by principle and subset."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str | None], Tally] = defaultdict(Tally)
        self.paid = Paid()
        self._other: dict[tuple[str, str, str], Verdict] = {}  # till the second order comes

    def add(self, verdict: Verdict, item: Item) -> None:
        """Count a verdict on an item."""
        tally = self.found[verdict.principle_id, item.subset]
        tally.verdicts += 1
        tally.graded += len(verdict.order) == 1
        self.paid.add(verdict)
        said = outcome(verdict.p_first)
        if said is None:
            tally.faults[verdict.fault or "null"] += 1
        if verdict.order not in BOTH:
            return
        if item.people not in (None, 0.5):
            tally.right[verdict.order, said == item.people] += 1
        if said in (0.0, 1.0):
            tally.shown_first[(said == 1) == (verdict.order == "ab")] += 1
        key = verdict.comparison_id, verdict.principle_id, verdict.judge
        before = self._other.pop(key, None)
        if before is None:
            self._other[key] = verdict
        elif said is not None and before.p_first is not None:
            first, second = sorted((before, verdict), key=lambda v: v.order)
            tally.swaps[outcome(first.p_first), outcome(second.p_first)] += 1

    def of(self, principle: str | None = None, subset: str | None = None) -> Tally:
        """The sum over what is asked for; None is all."""
        total = Tally()
        for (its_principle, its_subset), tally in self.found.items():
            if principle in (None, its_principle) and subset in (None, its_subset):
                total.add(tally)
        return total


def judge_card(
    judgements: Sequence[Judgement],
    tallies: Tallies,
    model: str,
    bootstrap: Bootstrap,
    seed: int = 0,
    calibrate: bool = False,
) -> dict[str, Any]:
    """All figures of a judge whose model is `model`."""
    judge, people = _outcomes(judgements), [j.item.people for j in judgements]
    more_words = [j.item.more_words for j in judgements]
    own = [_own(j.item.models, model) for j in judgements]
    soft = [
        (log_odds(j.label.p_first), j.item.people, j.item.prompt_id)
        for j in judgements
        if j.label and j.label.p_first is not None and j.item.people not in (None, 0.5)
    ]
    card = figures(judgements, judge, tallies.of(), bootstrap)
    card |= {
        "at_equal_length": at_equal_length(judge, people, more_words, bootstrap),
        "self_preference": self_preference(judge, people, own, bootstrap),
        "calibration": _calibration(judgements, [(delta, p) for delta, p, _ in soft]),
        "temperature": _rescaled(soft, seed) if calibrate else None,
        "by_principle": _by_principle(judgements, tallies, bootstrap),
        "by_subset": _by_subset(judgements, tallies, bootstrap),
    }
    return card


def figures(
    judgements: Sequence[Judgement], judge: Sequence[Value], tally: Tally, bootstrap: Bootstrap
) -> dict[str, Any]:
    """What is told of all, of a principle and of a subset; `judge` are its outcomes."""
    people = [j.item.people for j in judgements]
    more_words = [j.item.more_words for j in judgements]
    labels = [j.label for j in judgements if j.label]
    return {
        "pairs": len(judgements),
        "unlabelled": len(judgements) - len(labels),
        "null": dict(Counter(label.fault for label in labels if label.p_first is None)),
        "ties": judge.count(0.5),
        **agreement(judge, people, bootstrap),
        "longer_wins": longer_wins(judge, people, more_words, bootstrap),
        "position": position(tally, bootstrap),
        "verdicts": tally.verdicts,
        "faults": dict(tally.faults),
        "fault_rate": tally.faults.total() / tally.verdicts if tally.verdicts else None,
    }


def position(tally: Tally, bootstrap: Bootstrap) -> dict[str, Any] | None:
    """What a judge owes to the order of showing; None where none of its verdicts are on pairs whose
    order is known.

    `consistency`: of pairs of verdicts in both orders, how many say the same of the same response
    (a tie is the same as a tie alone). `first` and `second`: how many name whatever stands there,
    in both orders. `bias`: of all verdicts that name a winner, how many more name the first shown
    than the second, from -1 to 1. `right`: of the verdicts in each order on pairs of which people
    name a winner, how many name that one; a missing one does not.
    """
    if not (tally.swaps or tally.shown_first or tally.right):
        return None
    swaps = tally.swaps.total()
    same = sum(times for (ab, ba), times in tally.swaps.items() if ab == ba)
    named = tally.shown_first.total()
    return {
        "consistency": bootstrap.rate([1.0] * same + [0.0] * (swaps - same)),
        "first": tally.swaps[1.0, 0.0] / swaps if swaps else None,
        "second": tally.swaps[0.0, 1.0] / swaps if swaps else None,
        "bias": (tally.shown_first[True] - tally.shown_first[False]) / named if named else None,
        "right": {
            order: bootstrap.rate(
                [1.0] * tally.right[order, True] + [0.0] * tally.right[order, False]
            )
            for order in BOTH
        },
    }


def weight(card: Mapping[str, Any]) -> float | None:
    """What a judge's word should weigh: the log-odds of its agreement with people, 0 for one that
    is no better than chance. Half a pair is added on both sides (Krichevsky-Trofimov), as no judge
    is right for ever. None where it was held against nobody."""
    found = card["agreement"]
    if not found["n"]:
        return None
    share = (found["mean"] * found["n"] + 0.5) / (found["n"] + 1)
    return max(0.0, math.log(share / (1 - share)))


def _outcomes(judgements: Iterable[Judgement]) -> list[Value]:
    return [outcome(j.label.p_first) if j.label else None for j in judgements]


def _by_principle(
    judgements: Sequence[Judgement], tallies: Tallies, bootstrap: Bootstrap
) -> dict[str, Any]:
    names = dict.fromkeys(name for j in judgements if j.label for name in j.label.by_principle)
    found = {}
    for name in names:
        asked = [j for j in judgements if j.label and name in j.label.by_principle]
        said = [outcome(j.label.by_principle[name]) for j in asked]
        found[name] = figures(asked, said, tallies.of(principle=name), bootstrap)
    return found


def _by_subset(
    judgements: Sequence[Judgement], tallies: Tallies, bootstrap: Bootstrap
) -> dict[str, Any]:
    parts: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        if judgement.item.subset is not None:
            parts[judgement.item.subset].append(judgement)
    if len(parts) < SEVERAL:
        return {}
    return {
        name: figures(part, _outcomes(part), tallies.of(subset=name), bootstrap)
        for name, part in sorted(parts.items())
    }


def _own(models: tuple[str, str] | None, judge: str) -> int:
    """1 where the judge's own model wrote the first response, -1 the second, else 0."""
    if models is None:
        return 0
    first, second = (name in (judge, judge.partition(":")[2]) for name in models)
    return first - second


def _calibration(
    judgements: Sequence[Judgement], known: Sequence[tuple[float, float]]
) -> dict[str, Any] | None:
    """None where no label has a probability of its own: a bare choice claims no certainty."""
    said = {j.label.p_first for j in judgements if j.label} - {None}
    return None if not known or said <= {0.0, 0.5, 1.0} else calibration(known)


def _rescaled(soft: Sequence[tuple[float, float, str]], seed: int) -> dict[str, Any] | None:
    """A temperature fitted on one half of the prompts, and the calibration of the other half with
    it and without; None where a half is too small, or there is nothing to rescale."""
    halves: tuple[list, list] = ([], [])
    for delta, chosen, prompt_id in soft:
        halves[int(content_id("calibrate", seed, prompt_id)[:8], 16) % 2].append((delta, chosen))
    fit, held_out = halves
    t = temperature(fit)
    if t is None or not held_out:
        return None
    before = calibration(held_out)
    after = calibration([(delta / t, chosen) for delta, chosen in held_out])
    return {
        "temperature": t,
        "fitted_on": len(fit),
        "n": len(held_out),
        "ece_before": before["ece"],
        "ece": after["ece"],
        "bins": after["bins"],
    }
