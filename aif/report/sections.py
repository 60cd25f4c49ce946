"""What each part of the page shows: charts and tables of what the stages have left.

Each function gives None where its files are not there; the page then says which verb makes them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

from aif.report import charts
from aif.report.charts import Chart, Dot, Place
from aif.report.judge_stats import Judged, human_longer, judge_card
from aif.report.overview import named
from aif.report.schema import (
    Calibration,
    CardPart,
    Estimate,
    Evaluation,
    Match,
    Metric,
    People,
    Policy,
    Rate,
    RewardCard,
    TrainState,
    rows,
    state,
)
from aif.run import Run

MOST_PRINCIPLES = 12  # that are drawn; the tables have all

# What a policy declines: anything, what asks for harm, what does not.
REFUSALS = {
    "refusal_rate": "Declines",
    "refusal_rate_harmful": "Declines harm",
    "over_refusal_rate": "Declines others",
}

Measured = dict[tuple[str, str], list[tuple[float, float | None]]]  # (stage, name) -> (step, value)

# (stage, chart's title, {line: metric}); each is drawn where the run has measured it.
TRAINING = (
    ("sft", "Fine-tuning loss", {"training": "loss", "held out": "eval_loss"}),
    ("reward", "Reward-model loss", {"training": "loss", "held out": "eval_loss"}),
    ("ppo", "Score", {"score": "objective/scores", "held out": "eval/scores"}),
    ("ppo", "KL from the reference", {"KL": "objective/kl", "held out": "eval/kl"}),
    ("ppo", "Entropy", {"entropy": "policy/entropy_avg"}),
    ("ppo", "Share of ratios clipped", {"clipped": "policy/clipfrac_avg"}),
    ("ppo", "Explained variance of the critic", {"explained": "val/explained_variance"}),
    ("ppo", "Responses that end", {"ended": "val/eos_rate", "held out": "eval/eos_rate"}),
    (
        "ppo",
        "Response length, tokens",
        {"length": "val/response_length", "held out": "eval/response_length"},
    ),
)


def judging(judged: Judged) -> dict[str, Any] | None:
    """The judge's card, and how its labels are spread."""
    card = judge_card(judged)
    if not card:
        return None
    whole, shown = card[0], card[: 1 + MOST_PRINCIPLES]
    longer = [_dot(row["name"] or "whole label", row["longer"]) for row in shown]
    longer.append(_dot("people", human_longer(judged)))
    first = [_dot(row["name"] or "all principles", row["shown_first"]) for row in shown]
    pictures = [
        _forest("longer", "How often the longer response wins", longer, "share"),
        _forest("position", "How often the response shown first wins", first, "share"),
    ]
    return {
        "rows": card,
        "pairwise": bool(whole["swaps"]["n"]),
        "human": bool(whole["human"]["n"]),
        "charts": [picture for picture in pictures if picture],
        "histograms": [
            charts.histogram(
                f"spread-{n}", row["name"] or "whole label", row["values"], row["null"]
            )
            for n, row in enumerate(shown)
        ],
        "not_drawn": len(card) - len(shown),
    }


def _dot(label: str, rate: dict[str, Any] | Rate | None, mark: float | None = None) -> Dot | None:
    """A share as a row of a forest plot; None where there is nothing to take a share of."""
    found = rate if isinstance(rate, Rate) or rate is None else Rate(**rate)
    if found is None or found.accuracy is None:
        return None
    low, high = found.interval or (None, None)
    return Dot(label, found.accuracy, low, high, found.n, mark)


def reward_model(run: Run) -> dict[str, Any] | None:
    """The reward model's card as charts."""
    card = state(run, "reward-card", RewardCard)
    if card is None:
        return None
    kinds = [
        (told, part) for told, part in (("AI labels", card.ai), ("people", card.human)) if part
    ]
    pictures = [
        _forest(
            "rm-overall", "Accuracy, and how often the longer wins", _overall(kinds),
            mark="longer wins",
        )
    ]  # fmt: skip
    for told, part in kinds[:1]:
        pictures.append(_forest(
            "rm-confidence", f"By the label's confidence ({told})",
            [_dot(_confidence(row.least), row) for row in part.by_confidence],
        ))  # fmt: skip
        pictures.append(_forest(
            "rm-length", f"By words more in the better response ({told})",
            [_dot(_words(row.words_more), row) for row in part.by_length],
        ))  # fmt: skip
    principles = [_dot(name, row) for name, row in card.by_principle.items()]
    title = "By principle"
    if len(principles) > MOST_PRINCIPLES:
        title += f", the first {MOST_PRINCIPLES} of {len(principles)}"
    pictures.append(_forest("rm-principle", title, principles[:MOST_PRINCIPLES]))
    bins = {
        _calibrated(told, part.calibration): [
            (bin.confidence, bin.accuracy, bin.n) for bin in part.calibration.bins
        ]
        for told, part in kinds
        if part.calibration.bins
    }
    if bins:
        pictures.append(charts.calibration("rm-calibration", "Calibration", bins))
    if card.scores:
        pictures.append(charts.spreads("rm-scores", "Scores", card.scores))
    if len(card.curve) > 1:
        pictures.append(charts.curve("rm-curve", "Learning curve", card.curve))
    return {"pairs": card.pairs, "charts": [picture for picture in pictures if picture]}


def _overall(kinds: Sequence[tuple[str, CardPart]]) -> list[Dot | None]:
    dots = []
    for told, part in kinds:
        dots.append(_dot(told, part, part.longer_wins))
        dots.append(_dot(f"{told}, confident", part.confident))
    return dots


def _forest(
    name: str, title: str, dots: Iterable[Dot | None], x: str = "accuracy", mark: str = ""
) -> Chart | None:
    known = [dot for dot in dots if dot is not None]
    return charts.forest(name, title, known, x, 0.5, mark=mark) if known else None


def _calibrated(told: str, found: Calibration) -> str:
    return told if found.ece is None else f"{told}, ECE {found.ece:.3f}"


def _confidence(least: float) -> str:
    return f"{least:g} to {1 if least >= 0.9 else least + 0.1:g}"


def _words(bounds: tuple[float | None, float | None]) -> str:
    low, high = bounds
    if low is None:
        told = f"under {high:+g}"
    else:
        told = f"{low:+g} and more" if high is None else f"{low:+g} to {high - 1:+g}"
    return told.replace("-", "\N{MINUS SIGN}")


def measured(run: Run) -> Measured:
    """metrics.jsonl as lines, without those that have no number at all."""
    found: Measured = defaultdict(list)
    for row in rows(run, "metrics.jsonl", Metric):
        found[row.stage, row.name].append((row.step, row.value))
    return {
        key: sorted(points, key=itemgetter(0))
        for key, points in found.items()
        if any(value is not None for _, value in points)
    }


def training(found: Measured) -> list[tuple[str, list[Chart]]]:
    """The curves of the stages that have trained, under two headings."""
    made: dict[str, list[Chart]] = defaultdict(list)
    for number, (stage, title, names) in enumerate(TRAINING):
        series = {
            told: found[stage, name] for told, name in names.items() if (stage, name) in found
        }
        if series:
            heading = "By reinforcement" if stage == "ppo" else "Supervised"
            made[heading].append(charts.lines(f"train-{number}", title, series))
    return list(made.items())


def overoptimisation(
    found: Measured, ppo: TrainState | None, evaluation: Evaluation | None
) -> Chart | None:
    """Proxy and gold of the looks during PPO, and of the policies that were evaluated, by KL."""
    proxy, gold = (
        dict(found.get(("ppo", "eval/scores"), ())),
        dict(found.get(("ppo", "eval/gold"), ())),
    )
    path = [
        Place(f"{step:g}", kl, proxy.get(step), gold.get(step))
        for step, kl in found.get(("ppo", "eval/kl"), ())
        if kl is not None
    ]
    others = [
        Place(
            policy.name,
            policy.kl.mean,
            mean_of(policy.score),
            mean_of(policy.gold),
            policy.kl.bound,
        )
        for policy in (evaluation.policies if evaluation else ())
        if policy.kl and policy.kl.mean is not None
    ]
    known = [place for place in path + others if (place.proxy, place.gold) != (None, None)]
    if not known:
        return None
    many = f"{ppo.eval_prompts:,} held-out" if ppo and ppo.eval_prompts else "Held-out"
    return charts.overoptimisation(
        "kl", f"{many} prompts, by step",
        [place for place in path if place in known], [place for place in others if place in known],
    )  # fmt: skip


def mean_of(estimate: Estimate | None) -> float | None:
    """Its mean, if it is there and has one."""
    return estimate.mean if estimate else None


def evaluated(evaluation: Evaluation | None) -> dict[str, Any] | None:
    """Who wins how often, and what each policy is like."""
    if evaluation is None:
        return None
    pictures = [
        _estimates(key, title, x, [(told(one), getattr(one, key)) for one in found], line)
        for key, title, x, found, told, line in (
            ("win_rate", "Win rates", "share won", evaluation.matches, _against, 0.5),
            ("length_controlled", "Win rates at equal length", "share won", evaluation.matches,
             _against, 0.5),
            ("rating", "Ratings", "Elo points", evaluation.policies, _name, None),
            ("gold", "Gold", "gold", evaluation.policies, _name, None),
        )
    ]  # fmt: skip
    people = evaluation.human or People()
    pictures.append(_estimates(
        "people", "Agreement with what people chose", "share of choices",
        [("the judge", people.judge), ("the reward model", people.reward)], 0.5,
    ))  # fmt: skip
    policies = [_policy_row(policy) for policy in evaluation.policies]
    return {
        "evaluation": evaluation,
        "judge": named(evaluation.judge),
        "charts": [picture for picture in pictures if picture],
        "policies": policies,
        "refusals": [
            (key, told)
            for key, told in REFUSALS.items()
            if any(row[key] is not None for row in policies)
        ],
        "principles": list(
            dict.fromkeys(name for match in evaluation.matches for name in match.by_principle)
        ),
    }


def _against(match: Match) -> str:
    return f"{match.first} v. {match.second}"


def _name(policy: Policy) -> str:
    return policy.name


def _estimates(
    name: str, title: str, x: str, found: Sequence[tuple[str, Estimate | None]], line: float | None
) -> Chart | None:
    dots = [
        Dot(told, one.mean, one.low, one.high, one.n)
        for told, one in found
        if one is not None and one.mean is not None
    ]
    return charts.forest(name, title, dots, x, line) if dots else None


def _policy_row(policy: Policy) -> dict[str, Any]:
    """A policy with its shares as plain numbers, whichever of the two shapes they have."""
    plain = {
        key: value.mean if isinstance(value := getattr(policy, key), Estimate) else value
        for key in ("distinct_1", "distinct_2", "self_bleu", *REFUSALS)
    }
    return {"policy": policy, "model": policy.model and named(policy.model), **plain}
