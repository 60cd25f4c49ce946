"""The figures at the top of the page: where the policy stood and stands, and by whose word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aif.report.page import count, figure, share
from aif.report.schema import Evaluation, Policy
from aif.report.sections import Measured, mean_of

MOST = 5
FIRST = ("Win rate", "Gold", "Score (proxy)", "KL", "Words")
ARROW = " \N{RIGHTWARDS ARROW} "
Tile = dict[str, str]  # {"name", "value", "more"}


def tiles(
    measured: Measured,
    best_step: int | None,
    evaluation: Evaluation | None,
    judging: dict[str, Any] | None,
) -> list[Tile]:
    """The first MOST that the run has figures for, the most telling first; what an evaluation says
    counts before what was seen in training. `best_step` is that of the weights PPO ended with,
    where it is not the last one."""
    found: dict[str, Tile] = {}
    for tile in (
        *_of_evaluation(evaluation), *_of_looks(measured, best_step), *_of_labels(judging)
    ):  # fmt: skip
        found.setdefault(tile["name"], tile)
    rank = {name: number for number, name in enumerate(FIRST)}
    return sorted(found.values(), key=lambda tile: rank.get(tile["name"], MOST))[:MOST]


def _of_evaluation(evaluation: Evaluation | None) -> Iterator[Tile]:
    """The last policy against the one that all are held against."""
    if evaluation is None:
        return
    age = {policy.name: number for number, policy in enumerate(evaluation.policies)}
    known = [match for match in evaluation.matches if mean_of(match.win_rate) is not None]
    if not known:
        return
    match = max(known, key=lambda m: (m.second == evaluation.against, age.get(m.first, -1)))
    rate, more = match.win_rate, f"{match.first} against {match.second}"
    if rate.low is not None and rate.high is not None:
        more += f", {share(rate.low)} to {share(rate.high)}"
    if (even := mean_of(match.length_controlled)) is not None:
        more += f"; at equal length {share(even)}"
    yield {"name": "Win rate", "value": share(rate.mean), "more": more}
    policies = {policy.name: policy for policy in evaluation.policies}
    before, after = (policies.get(name, Policy()) for name in (match.second, match.first))
    for key, name in (("gold", "Gold"), ("score", "Score (proxy)"), ("words", "Words")):
        was, now = mean_of(getattr(before, key)), mean_of(getattr(after, key))
        if was is not None and now is not None:
            value, more = f"{figure(was)}{ARROW}{figure(now)}", f"{match.second} to {match.first}"
            yield {"name": name, "value": value, "more": more}
    if (kl := mean_of(after.kl)) is not None:
        most = "at most, " if after.kl.bound else ""
        yield {"name": "KL", "value": figure(kl), "more": f"{most}{match.first}, nats a response"}


def _of_looks(measured: Measured, best_step: int | None) -> Iterator[Tile]:
    """PPO's first look at its held-out prompts, and the one at what it ended with."""
    for name, told in (("eval/gold", "Gold"), ("eval/scores", "Score (proxy)"), ("eval/kl", "KL")):
        if len(looks := dict(measured.get(("ppo", name), ()))) > 1:
            step = best_step if best_step in looks else max(looks)
            before, after = figure(looks[min(looks)]), figure(looks[step])
            value, more = f"{before}{ARROW}{after}", f"before and at step {step:,}"
            if told == "KL":
                value, more = after, f"nats a response, at step {step:,}"
            yield {"name": told, "value": value, "more": f"held out, {more}"}


def _of_labels(judging: dict[str, Any] | None) -> Iterator[Tile]:
    if judging is None:
        return
    whole = judging["rows"][0]
    n = len(whole["values"])
    yield {
        "name": "Labels", "value": count(n),
        "more": f"and {count(whole['null'])} null",
    }  # fmt: skip
    for key, told, more in (
        ("human", "As people chose", "share of labels that name the winner people named"),
        ("swaps", "Same winner swapped", "of pairs of verdicts, the responses in either order"),
        ("longer", "Longer wins", "share of labels; 50 % would be no lean"),
        ("confident", "Confident", "share of labels outside of 0.3 to 0.7"),
    ):
        if whole[key]["n"]:
            yield {"name": told, "value": share(whole[key]["accuracy"]), "more": more}
