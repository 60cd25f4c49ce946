"""`aif evaluate`: policies against each other, in a table that fits 60 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from aif.cli.options import (
    CONSTITUTION,
    JUDGE,
    Console,
    Flag,
    RunFolder,
    existing_run,
    limit,
    verb,
)
from aif.cli.render import counts, interval, mean, number, table_row

evaluate_app = typer.Typer()

NAME = 12  # columns for a policy's name
HEAD = f"{'policy':{NAME}} {'wins':>4} {'95 %':9} {'gold':>6} {'score':>6} {'KL':>6} words dist2"


@verb(
    evaluate_app,
    Flag(
        "--policy", "evaluate.policies", list[str],
        "A policy to compare: base, sft, ppo, 2/ppo, best-of-4, reference (the prompts' own "
        "responses), runs/other:ppo or any model; repeatable. Default: all that the run has.",
        "NAME",
    ),
    Flag(
        "--against", "evaluate.against", str,
        "The policy that the others play against; default: sft, or else base.", "NAME",
    ),
    Flag(
        "--prompts", "evaluate.prompts", str,
        "The prompts: JSONL with `prompt`, or hf:NAME; default: those that `aif ppo` held out.",
    ),
    Flag(
        "--human", "evaluate.human", str,
        "Pairs with people's choices, to measure how often the judge agrees.",
    ),
    CONSTITUTION,
    JUDGE,
    limit("evaluate"),
)  # fmt: skip
def evaluate(run: RunFolder, settings: dict[str, Any], console: Console) -> None:
    """Let the judge compare policies. Writes evaluate.json and evaluation.jsonl.

    Every answer is kept in RUN/evaluation: a second call with one more policy asks only about that
    one.
    """
    opened = existing_run(run, settings, unless="evaluate.prompts")
    console.run_distributed("evaluate", opened, evaluate_lines)


def evaluate_lines(summary: dict[str, Any]) -> list[str]:
    """Who wins how often against whom, and what each policy's responses are like."""
    return [
        *standing(summary),
        *_people(summary["human"]),
        *_missing(summary),
        f"{summary['run']}/evaluate.json",
    ]


def standing(summary: Mapping[str, Any]) -> list[str]:
    """The table alone, with a row for each policy, and its caption."""
    against = summary["against"]
    rates = {m["first"]: m["win_rate"] for m in summary["matches"] if m["second"] == against}
    return [
        f"{summary['prompts']:,} prompts, judged by {summary['judge']}",
        f"({summary['protocol']}, {summary['constitution']}); wins are against {against}",
        HEAD,
        *(line for p in summary["policies"] for line in _policy(p, rates.get(p["name"]))),
    ]


def _policy(policy: Mapping[str, Any], rate: Mapping[str, Any] | None) -> list[str]:
    kl = mean(policy["kl"], "z.1f")
    if policy["kl"] and policy["kl"].get("bound"):
        kl = f"<{kl}"
    cells = (
        f"{mean(rate):>4} {interval(rate):9} {mean(policy['gold']):>6} "
        f"{mean(policy['score']):>6} {kl:>6} {mean(policy['words'], 'z.0f'):>5} "
        f"{number(policy['distinct_2']):>5}"
    )
    return table_row(policy["name"], cells, NAME)


def _people(human: Mapping[str, Any] | None) -> list[str]:
    if human is None:
        return []
    line = (
        f"of {human['pairs']:,} choices of people the judge agrees with "
        f"{mean(human['judge'], 'z.0%')}"
    )
    if human["reward"]:
        line += f", the reward model with {mean(human['reward'], 'z.0%')}"
    return [line]


def _missing(summary: Mapping[str, Any]) -> list[str]:
    """Responses, results and answers that are not there, in one line if there are any."""
    no_response = [
        f"{policy['name']} {n:,} {kind}"
        for policy in summary["policies"]
        for kind, n in policy["faults"].items()
    ]
    no_result = [
        f"{match['first']} v. {match['second']} {match['null']:,}"
        for match in summary["matches"]
        if match["null"]
    ]
    parts = {
        "no response": ", ".join(no_response),
        "no result": ", ".join(no_result),
        "failed calls of the judge": counts(summary["faults"]),
    }
    line = "; ".join(f"{name}: {part}" for name, part in parts.items() if part)
    return [line] if line else []
