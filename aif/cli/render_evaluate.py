"""What a person is told of an evaluation: a table that fits 60 columns, and what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAME = 12  # columns for a policy's name; a longer one has a line of its own
HEAD = f"{'policy':{NAME}} {'wins':>4} {'95 %':9} {'gold':>6} {'score':>6} {'KL':>6} words dist2"


def evaluate(summary: dict[str, Any]) -> list[str]:
    """Who wins how often against whom, and what each policy's responses are like."""
    return [
        *standing(summary),
        *_people(summary["human"]),
        *_missing(summary),
        f"{summary['run']}/evaluate.json",
    ]


def standing(summary: Mapping[str, Any]) -> list[str]:
    """The table alone, a policy a line, and what it is of."""
    against = summary["against"]
    rates = {m["first"]: m["win_rate"] for m in summary["matches"] if m["second"] == against}
    return [
        f"{summary['prompts']:,} prompts, judged by {summary['judge']}",
        f"({summary['protocol']}, {summary['constitution']}); wins are against {against}",
        HEAD,
        *(line for p in summary["policies"] for line in _policy(p, rates.get(p["name"]))),
    ]


def _policy(policy: Mapping[str, Any], rate: Mapping[str, Any] | None) -> list[str]:
    name = policy["name"]
    low, high = (rate[end] if rate else None for end in ("low", "high"))
    interval = "" if low is None else f"{low:.2f}-{high:.2f}"
    kl = _mean(policy["kl"], ".1f")
    if policy["kl"] and policy["kl"].get("bound"):
        kl = f"<{kl}"
    figures = (
        f"{_mean(rate, '.2f'):>4} {interval:9} {_mean(policy['gold'], '.2f'):>6} "
        f"{_mean(policy['score'], '.2f'):>6} {kl:>6} {_mean(policy['words'], '.0f'):>5} "
        f"{_figure(policy['distinct_2'], '.2f'):>5}"
    )
    if len(name) > NAME:
        return [name, f"{'':{NAME}} {figures}"]
    return [f"{name:{NAME}} {figures}"]


def _mean(estimate: Mapping[str, Any] | None, form: str) -> str:
    return _figure(estimate["mean"] if estimate else None, form)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, f"z{form}")  # z: no -0.0


def _people(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    said = f"of {found['pairs']:,} choices of people the judge agrees with "
    told = [f"{said}{_mean(found['judge'], '.0%')}"]
    if found["reward"]:
        told.append(f"the reward model with {_mean(found['reward'], '.0%')}")
    return [", ".join(told)]


def _missing(summary: Mapping[str, Any]) -> list[str]:
    """Responses, results and answers that are not there, in one line if there are any."""
    silent = [
        f"{policy['name']} {n:,} {kind}"
        for policy in summary["policies"]
        for kind, n in policy["faults"].items()
    ]
    undecided = [
        f"{match['first']} v. {match['second']} {match['null']:,}"
        for match in summary["matches"]
        if match["null"]
    ]
    failed = [f"{n:,} {kind}" for kind, n in summary["faults"].items()]
    told = {"no response": silent, "no result": undecided, "failed calls of the judge": failed}
    line = "; ".join(f"{what}: {', '.join(found)}" for what, found in told.items() if found)
    return [line] if line else []
