"""The parts of the page: charts and tables of the files that the stages have written.

Each function returns None without its files; the page then says which verb makes them.
"""

from __future__ import annotations

from collections import defaultdict
from operator import itemgetter
from typing import Any

from aif.evaluation.schema import Evaluation, People, PolicyResult
from aif.report.charts import (
    Chart,
    Dot,
    Place,
    calibration,
    curve,
    forest,
    histogram,
    lines,
    overoptimisation,
    spreads,
)
from aif.report.judge_stats import LabelSurvey, human_longer, judge_rows
from aif.report.overview import named
from aif.report.schema import TrainState, rows, state
from aif.run import Run
from aif.stats.schema import Estimate, Rate
from aif.train.metrics import Metric
from aif.train.reward.schema import RewardCard

MOST_PRINCIPLES = 12  # that are drawn; the tables have all

# What a policy declines: anything, prompts that ask for harm, prompts that do not.
REFUSALS = {
    "refusal_rate": "Declines",
    "refusal_rate_harmful": "Declines harm",
    "over_refusal_rate": "Declines others",
}

Metrics = dict[tuple[str, str], list[tuple[float, float | None]]]  # (stage, name) -> (step, value)

# (stage, chart's title, {line: metric}); a chart is drawn if the run has its metrics.
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


def judging(survey: LabelSurvey) -> dict[str, Any] | None:
    """The judge's card, and how its labels are spread."""
    table = judge_rows(survey)
    if not table:
        return None
    whole, drawn = table[0], table[: 1 + MOST_PRINCIPLES]
    longer = [Dot.of(row["name"] or "whole label", Rate(**row["longer"])) for row in drawn]
    longer.append(Dot.of("people", Rate(**human_longer(survey))))
    first = [Dot.of(row["name"] or "all principles", Rate(**row["shown_first"])) for row in drawn]
    return {
        "rows": table,
        "pairwise": bool(whole["swaps"]["n"]),
        "human": bool(whole["human"]["n"]),
        "charts": _charts(
            forest("longer", "How often the longer response wins", longer, "share"),
            forest("position", "How often the response shown first wins", first, "share"),
        ),
        "histograms": [
            histogram(f"spread-{n}", row["name"] or "whole label", row["values"], row["null"])
            for n, row in enumerate(drawn)
        ],
        "not_drawn": len(table) - len(drawn),
    }


def _charts(*charts: Chart | None) -> list[Chart]:
    return [chart for chart in charts if chart]


def reward_model(run: Run) -> dict[str, Any] | None:
    """The reward model's card as charts."""
    card = state(run, "reward-card", RewardCard)
    if card is None:
        return None
    kinds = {"AI labels": card.ai, "people": card.human}
    kinds = {kind: part for kind, part in kinds.items() if part}
    overall = [
        dot
        for kind, part in kinds.items()
        for dot in (
            Dot.of(kind, part, part.longer_wins),
            Dot.of(f"{kind}, confident", part.confident),
        )
    ]
    title = "Accuracy, and how often the longer wins"
    drawn = [forest("rm-overall", title, overall, "accuracy", mark="longer wins")]
    for kind, part in list(kinds.items())[:1]:
        by_confidence = [Dot.of(_confidence(row.least), row) for row in part.by_confidence]
        by_length = [Dot.of(_length(*row.words_more), row) for row in part.by_length]
        title = f"By the label's confidence ({kind})"
        drawn.append(forest("rm-confidence", title, by_confidence, "accuracy"))
        title = f"By words more in the better response ({kind})"
        drawn.append(forest("rm-length", title, by_length, "accuracy"))
    principles = [Dot.of(name, row) for name, row in card.by_principle.items()]
    title = "By principle"
    if len(principles) > MOST_PRINCIPLES:
        title += f", the first {MOST_PRINCIPLES} of {len(principles)}"
    drawn.append(forest("rm-principle", title, principles[:MOST_PRINCIPLES], "accuracy"))
    calibrations = [(kind, part.calibration) for kind, part in kinds.items()]
    drawn.append(calibration("rm-calibration", "Calibration", calibrations))
    if card.scores:
        drawn.append(spreads("rm-scores", "Scores", card.scores))
    if len(card.curve) > 1:
        drawn.append(curve("rm-curve", "Learning curve", card.curve))
    return {"pairs": card.pairs, "charts": _charts(*drawn)}


def _confidence(least: float) -> str:
    return f"{least:g} to {1 if least >= 0.9 else least + 0.1:g}"


def _length(low: float | None, high: float | None) -> str:
    if low is None:
        label = f"under {high:+g}"
    else:
        label = f"{low:+g} and more" if high is None else f"{low:+g} to {high - 1:+g}"
    return label.replace("-", "\N{MINUS SIGN}")


def metrics(run: Run) -> Metrics:
    """metrics.jsonl as lines, without the lines that have no number at all."""
    lines: Metrics = defaultdict(list)
    for row in rows(run, "metrics.jsonl", Metric):
        lines[row.stage, row.name].append((row.step, row.value))
    return {
        key: sorted(points, key=itemgetter(0))
        for key, points in lines.items()
        if any(value is not None for _, value in points)
    }


def training(metrics: Metrics) -> list[tuple[str, list[Chart]]]:
    """The curves of the stages that have trained, under two headings."""
    charts: dict[str, list[Chart]] = defaultdict(list)
    for number, (stage, title, names) in enumerate(TRAINING):
        series = {
            label: metrics[stage, name] for label, name in names.items() if (stage, name) in metrics
        }
        if series:
            heading = "By reinforcement" if stage == "ppo" else "Supervised"
            charts[heading].append(lines(f"train-{number}", title, series))
    return list(charts.items())


def score_by_kl(
    metrics: Metrics, ppo: TrainState | None, evaluation: Evaluation | None
) -> Chart | None:
    """Proxy and gold by KL: of the evaluations during PPO, and of the evaluated policies."""
    proxy, gold, kls = (
        dict(metrics.get(("ppo", f"eval/{name}"), ())) for name in ("scores", "gold", "kl")
    )
    path = [
        Place(f"{step:g}", kl, proxy.get(step), gold.get(step))
        for step, kl in kls.items()
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
    path, others = (
        [place for place in places if (place.proxy, place.gold) != (None, None)]
        for places in (path, others)
    )
    if not path and not others:
        return None
    many = f"{ppo.eval_prompts:,} held-out" if ppo and ppo.eval_prompts else "Held-out"
    return overoptimisation("kl", f"{many} prompts, by step", path, others)


def mean_of(estimate: Estimate | None) -> float | None:
    """The mean of an estimate, or None."""
    return estimate.mean if estimate else None


def policies(evaluation: Evaluation | None) -> dict[str, Any] | None:
    """Who wins how often, and the statistics of each policy."""
    if evaluation is None:
        return None
    matches = [(f"{match.first} v. {match.second}", match) for match in evaluation.matches]
    named_policies = [(policy.name, policy) for policy in evaluation.policies]
    drawn = [
        forest(key, title, [Dot.of(label, getattr(one, key)) for label, one in of], x, line)
        for key, title, x, of, line in (
            ("win_rate", "Win rates", "share won", matches, 0.5),
            ("length_controlled", "Win rates at equal length", "share won", matches, 0.5),
            ("rating", "Ratings", "Elo points", named_policies, None),
            ("gold", "Gold", "gold", named_policies, None),
        )
    ]
    people = evaluation.human or People()
    agreement = [Dot.of("the judge", people.judge), Dot.of("the reward model", people.reward)]
    title = "Agreement with what people chose"
    drawn.append(forest("people", title, agreement, "share of choices"))
    table = [_policy_row(policy) for policy in evaluation.policies]
    return {
        "evaluation": evaluation,
        "judge": named(evaluation.judge),
        "charts": _charts(*drawn),
        "policies": table,
        "refusals": [
            (key, title)
            for key, title in REFUSALS.items()
            if any(row[key] is not None for row in table)
        ],
        "principles": list(
            dict.fromkeys(name for match in evaluation.matches for name in match.by_principle)
        ),
    }


def _policy_row(policy: PolicyResult) -> dict[str, Any]:
    """A policy with its shares as plain numbers, whether they have an interval or not."""
    plain = {
        key: value.mean if isinstance(value := getattr(policy, key), Estimate) else value
        for key in ("distinct_1", "distinct_2", "self_bleu", *REFUSALS)
    }
    return {"policy": policy, "model": policy.model and named(policy.model), **plain}
