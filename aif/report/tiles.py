"""The figures at the top of the page: where the policy stood and stands, and by whose word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aif.report.files import Evaluation
from aif.report.page import count, figure, share
from aif.report.sections import Measured

MOST = 4
Tile = dict[str, str]  # {"name", "value", "more"}


def tiles(
    measured: Measured,
    best_step: int | None,
    evaluation: Evaluation | None,
    judging: dict[str, Any] | None,
) -> list[Tile]:
    """The first MOST that the run has figures for, the most telling first. `best_step` is that of
    the weights PPO ended with, where it is not the last one."""
    found = [*_of_evaluation(evaluation), *_of_looks(measured, best_step), *_of_labels(judging)]
    return found[:MOST]


def _of_evaluation(evaluation: Evaluation | None) -> Iterator[Tile]:
    """The win rate of the last policy (they stand in the order in which they were made)."""
    if evaluation is None:
        return
    age = {policy.name: number for number, policy in enumerate(evaluation.policies)}
    known = [
        match for match in evaluation.matches if match.win_rate and match.win_rate.mean is not None
    ]
    if not known:
        return
    match = max(known, key=lambda m: (m.second == evaluation.against, age.get(m.first, -1)))
    rate, more = match.win_rate, f"{match.first} against {match.second}"
    if rate.low is not None and rate.high is not None:
        more += f", {share(rate.low)} to {share(rate.high)}"
    yield {"name": "Win rate", "value": share(rate.mean), "more": more}


def _of_looks(measured: Measured, best_step: int | None) -> Iterator[Tile]:
    """PPO's first look at its held-out prompts, and the one at what it ended with."""
    for name, told in (("eval/gold", "Gold"), ("eval/scores", "Score (proxy)"), ("eval/kl", "KL")):
        if len(looks := dict(measured.get(("ppo", name), ()))) > 1:
            step = best_step if best_step in looks else max(looks)
            before, after = figure(looks[min(looks)]), figure(looks[step])
            value, more = f"{before} \N{RIGHTWARDS ARROW} {after}", f"before and at step {step:,}"
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
