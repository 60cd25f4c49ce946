"""`aif revise` and `aif filter`: revise responses, and keep the good revisions."""

from __future__ import annotations

from typing import Any

import typer

from aif.cli.options import (
    BASE_URL,
    CONSTITUTION,
    JUDGE,
    Console,
    Flag,
    RunFolder,
    existing_run,
    limit,
    max_fault_rate,
    seed,
    verb,
)
from aif.cli.render import counts

revise_app = typer.Typer()


@verb(
    revise_app,
    Flag("--constitution", "revise.constitution", str, CONSTITUTION.help),
    Flag("--rounds", "revise.rounds", int, "How often a response is critiqued and revised."),
    Flag("--reviser", "reviser.model", str, "The model that revises; default: the policy."),
    Flag("--base-url", "reviser.base_url", str, "Server of an openai: reviser, ending in /v1."),
    seed("revise"),
    limit("revise"),
    max_fault_rate("revise"),
)
def revise(run: RunFolder, settings: dict[str, Any], console: Console) -> None:
    """Critique and revise responses. Writes revisions.jsonl.

    Each round uses one principle, and every round is kept. A second call with an edited principle
    asks again only from the first round that used it.
    """
    console.run_stage("revise", existing_run(run, settings), _revise_lines)


def _revise_lines(summary: dict[str, Any]) -> list[str]:
    """Good revisions by round, and what became of the others."""
    by_round = ", ".join(f"{n:,}" for n in summary["revisions_by_round"])
    lines = [
        f"{summary['revisions']:,} revisions of {summary['responses']:,} responses "
        f"(by round: {by_round}), {summary['calls_made']:,} calls made, "
        f"{summary['calls_kept']:,} kept"
    ]
    if faults := summary["revision_faults"]:
        lines.append(f"rounds that left the text as it was: {counts(faults)}")
    if summary["unfinished"]:
        lines.append(f"{summary['unfinished']:,} responses wait for calls that failed")
    return [*lines, f"{summary['run']}/revisions.jsonl"]


@verb(revise_app, CONSTITUTION, JUDGE, BASE_URL, max_fault_rate("label"), name="filter")
def filter_(run: RunFolder, settings: dict[str, Any], console: Console) -> None:
    """Keep the revisions that the judge prefers to the responses. Writes kept.jsonl."""
    console.run_stage("filter", existing_run(run, settings), _filter_lines)


def _filter_lines(summary: dict[str, Any]) -> list[str]:
    """What was kept, by round."""
    lines = [
        f"{summary['kept']:,} of {summary['revisions']:,} revisions kept "
        f"({summary['kept_rate']:.0%}), {summary['calls_made']:,} calls made, "
        f"{summary['calls_kept']:,} kept"
    ]
    for number, one in summary["by_round"].items():
        mean = one["mean_p_revision"]
        better = "" if mean is None else f", mean probability of being better {mean:.2f}"
        lines.append(f"  round {number}: {one['kept_rate']:.0%} kept{better}")
    return [*lines, f"{summary['run']}/kept.jsonl"]
