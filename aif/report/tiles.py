"""The numbers at the top of the page: the policy before and after, and by which measure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aif.evaluation.schema import Evaluation, PolicyResult
from aif.report.page import count, figure, share
from aif.report.sections import Metrics, mean_of

MOST = 5
FIRST = ("Win rate", "Gold", "Score (proxy)", "KL", "Words")
ARROW = " \N{RIGHTWARDS ARROW} "
Tile = dict[str, str]  # {"name", "value", "more"}


def tiles(
    metrics: Metrics,
    best_step: int | None,
    evaluation: Evaluation | None,
    judging: dict[str, Any] | None,
) -> list[Tile]:
    """At most MOST tiles, the most important first. An evaluation counts before the metrics of
    training. `best_step` is the step whose weights PPO ended with, if it is not the last step."""
    by_name: dict[str, Tile] = {}
    for tile in (
        *_of_evaluation(evaluation), *_of_ppo(metrics, best_step), *_of_labels(judging)
    ):  # fmt: skip
        by_name.setdefault(tile["name"], tile)
    rank = {name: number for number, name in enumerate(FIRST)}
    return sorted(by_name.values(), key=lambda tile: rank.get(tile["name"], MOST))[:MOST]


def _of_evaluation(evaluation: Evaluation | None) -> Iterator[Tile]:
    """The last policy against the one that all others play against."""
    if evaluation is None:
        return
    age = {policy.name: number for number, policy in enumerate(evaluation.policies)}
    matches = [match for match in evaluation.matches if mean_of(match.win_rate) is not None]
    if not matches:
        return
    match = max(matches, key=lambda m: (m.second == evaluation.against, age.get(m.first, -1)))
    rate, more = match.win_rate, f"{match.first} against {match.second}"
    if rate.low is not None and rate.high is not None:
        more += f", {share(rate.low)} to {share(rate.high)}"
    if (even := mean_of(match.length_controlled)) is not None:
        more += f"; at equal length {share(even)}"
    yield {"name": "Win rate", "value": share(rate.mean), "more": more}
    policies = {policy.name: policy for policy in evaluation.policies}
    before, after = (policies.get(name, PolicyResult()) for name in (match.second, match.first))
    for key, name in (("gold", "Gold"), ("score", "Score (proxy)"), ("words", "Words")):
        was, now = mean_of(getattr(before, key)), mean_of(getattr(after, key))
        if was is not None and now is not None:
            value, more = f"{figure(was)}{ARROW}{figure(now)}", f"{match.second} to {match.first}"
            yield {"name": name, "value": value, "more": more}
    if (kl := mean_of(after.kl)) is not None:
        most = "at most, " if after.kl.bound else ""
        yield {"name": "KL", "value": figure(kl), "more": f"{most}{match.first}, nats a response"}


def _of_ppo(metrics: Metrics, best_step: int | None) -> Iterator[Tile]:
    """PPO's first evaluation on held-out prompts, and the one of the weights it ended with."""
    for key, name in (("eval/gold", "Gold"), ("eval/scores", "Score (proxy)"), ("eval/kl", "KL")):
        if len(by_step := dict(metrics.get(("ppo", key), ()))) > 1:
            step = best_step if best_step in by_step else max(by_step)
            before, after = figure(by_step[min(by_step)]), figure(by_step[step])
            value, more = f"{before}{ARROW}{after}", f"before and at step {step:,}"
            if name == "KL":
                value, more = after, f"nats a response, at step {step:,}"
            yield {"name": name, "value": value, "more": f"held out, {more}"}


def _of_labels(judging: dict[str, Any] | None) -> Iterator[Tile]:
    if judging is None:
        return
    whole = judging["rows"][0]
    n = len(whole["values"])
    yield {
        "name": "Labels", "value": count(n),
        "more": f"and {count(whole['null'])} null",
    }  # fmt: skip
    for key, name, more in (
        ("human", "As people chose", "share of labels that name the winner people named"),
        ("swaps", "Same winner swapped", "of pairs of verdicts, the responses in either order"),
        ("longer", "Longer wins", "share of labels; 50 % would be no lean"),
        ("confident", "Confident", "share of labels outside of 0.3 to 0.7"),
    ):
        if whole[key]["n"]:
            yield {"name": name, "value": share(whole[key]["accuracy"]), "more": more}
