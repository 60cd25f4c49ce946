"""A judge's card: how far to trust the judge, measured on pairs with people's choices.

The card needs only labels and verdicts, so it costs no call. It has statistics over all pairs, by
principle and by subset, each with its count. Null labels are only counted.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aif.auditing.verdict_counts import BOTH, VerdictCounts, VerdictTable
from aif.data.human import Item
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
from aif.store.records import Label, content_id

FEWEST_SUBSETS = 2  # with one subset there is nothing to compare


@dataclass(frozen=True, slots=True)
class Judgement:
    """A judge's label of an item; `label` is None where the judge was not asked."""

    item: Item
    label: Label | None

    @property
    def outcome(self) -> Value:
        """1.0 for a win of the first response, 0.0 of the second, 0.5 for a tie."""
        return outcome(self.label.p_first) if self.label else None


def judge_card(
    judgements: Sequence[Judgement],
    verdicts: VerdictTable,
    model: str,
    bootstrap: Bootstrap,
    seed: int = 0,
    calibrate: bool = False,
) -> dict[str, Any]:
    """All statistics of a judge whose model is `model`."""
    judge, people = [j.outcome for j in judgements], [j.item.people for j in judgements]
    more_words = [j.item.more_words for j in judgements]
    own = [_own(j.item.models, model) for j in judgements]
    soft = [
        (log_odds(j.label.p_first), j.item.people, j.item.prompt_id)
        for j in judgements
        if j.label and j.label.p_first is not None and j.item.people not in (None, 0.5)
    ]
    return part_card(judgements, judge, verdicts.of(), bootstrap) | {
        "at_equal_length": at_equal_length(judge, people, more_words, bootstrap),
        "self_preference": self_preference(judge, people, own, bootstrap),
        "calibration": _calibration(judgements, [(delta, p) for delta, p, _ in soft]),
        "temperature": _rescaled(soft, seed) if calibrate else None,
        "by_principle": _by_principle(judgements, verdicts, bootstrap),
        "by_subset": _by_subset(judgements, verdicts, bootstrap),
    }


def part_card(
    judgements: Sequence[Judgement],
    judge: Sequence[Value],
    counts: VerdictCounts,
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """The statistics of all pairs, of a principle or of a subset; `judge` has the outcomes."""
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
        "position": position(counts, bootstrap),
        "verdicts": counts.verdicts,
        "faults": dict(counts.faults),
        "fault_rate": counts.faults.total() / counts.verdicts if counts.verdicts else None,
    }


def position(counts: VerdictCounts, bootstrap: Bootstrap) -> dict[str, Any] | None:
    """How much the order of the two responses affects a judge; None without verdicts on pairs.

    `consistency`: the share of pairs of verdicts in both orders with the same outcome; a tie equals
    only a tie. `first` and `second`: the share of these pairs that name the response in that place
    both times. `bias`: of the verdicts with a winner, the share for the response shown first minus
    the share for the second, from -1 to 1. `right`: for each order, the share of verdicts with the
    same winner as people's; a missing verdict counts as wrong.
    """
    if not (counts.swaps or counts.shown_first or counts.right):
        return None
    swaps, same = counts.swaps.total(), counts.same_swapped
    named = counts.shown_first.total()
    return {
        "consistency": bootstrap.rate([1.0] * same + [0.0] * (swaps - same)),
        "first": counts.swaps[1.0, 0.0] / swaps if swaps else None,
        "second": counts.swaps[0.0, 1.0] / swaps if swaps else None,
        "bias": (counts.shown_first[True] - counts.shown_first[False]) / named if named else None,
        "right": {
            order: bootstrap.rate(
                [1.0] * counts.right[order, True] + [0.0] * counts.right[order, False]
            )
            for order in BOTH
        },
    }


def weight(card: Mapping[str, Any]) -> float | None:
    """The weight of a judge: the log-odds of its agreement with people, 0 for a judge that is no
    better than chance; None without pairs of people. Half a pair is added on both sides
    (Krichevsky-Trofimov), so that full agreement has a finite weight."""
    agreement = card["agreement"]
    if not agreement["n"]:
        return None
    share = (agreement["mean"] * agreement["n"] + 0.5) / (agreement["n"] + 1)
    return max(0.0, math.log(share / (1 - share)))


def _by_principle(
    judgements: Sequence[Judgement], verdicts: VerdictTable, bootstrap: Bootstrap
) -> dict[str, Any]:
    names = dict.fromkeys(name for j in judgements if j.label for name in j.label.by_principle)
    cards = {}
    for name in names:
        part = [j for j in judgements if j.label and name in j.label.by_principle]
        outcomes = [outcome(j.label.by_principle[name]) for j in part]
        cards[name] = part_card(part, outcomes, verdicts.of(principle=name), bootstrap)
    return cards


def _by_subset(
    judgements: Sequence[Judgement], verdicts: VerdictTable, bootstrap: Bootstrap
) -> dict[str, Any]:
    parts: dict[str, list[Judgement]] = defaultdict(list)
    for judgement in judgements:
        if judgement.item.subset is not None:
            parts[judgement.item.subset].append(judgement)
    if len(parts) < FEWEST_SUBSETS:
        return {}
    return {
        name: part_card(part, [j.outcome for j in part], verdicts.of(subset=name), bootstrap)
        for name, part in sorted(parts.items())
    }


def _own(models: tuple[str, str] | None, judge: str) -> int:
    """1 where the judge's own model wrote the first response, -1 the second, else 0."""
    if models is None:
        return 0
    first, second = (name in (judge, judge.partition(":")[2]) for name in models)
    return first - second


def _calibration(
    judgements: Sequence[Judgement], pairs: Sequence[tuple[float, float]]
) -> dict[str, Any] | None:
    """None if no label has its own probability: a choice alone has no confidence."""
    probabilities = {j.label.p_first for j in judgements if j.label} - {None}
    return None if not pairs or probabilities <= {0.0, 0.5, 1.0} else calibration(pairs)


def _rescaled(soft: Sequence[tuple[float, float, str]], seed: int) -> dict[str, Any] | None:
    """A temperature fitted on one half of the prompts, and the calibration of the other half with
    and without it; None if a half is too small or there is nothing to rescale."""
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
