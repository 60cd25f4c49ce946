"""`aif respond`, `aif resample`, `aif vote` and `aif compare`: responses and their pairs."""

from __future__ import annotations

from typing import Any

import typer

from aif.cli.options import Console, Flag, RunFolder, existing_run, limit, open_run, seed, verb
from aif.cli.render import counts

sample_app = typer.Typer()
POLICY = "The model to sample from, named as a judge is."


@verb(
    sample_app,
    Flag("--prompts", "respond.prompts", str, "The prompts: JSONL with `prompt`, or hf:NAME."),
    Flag("--few-shot", "respond.few_shot", str, "JSONL of examples to put before each prompt."),
    Flag("--shots", "respond.shots", str, "The old name of --few-shot.", hidden=True),
    Flag("--policy", "policy.model", str, POLICY),
    Flag("--samples", "respond.samples", int, "The number of responses to each prompt."),
    seed("respond"),
    limit("respond"),
)
def respond(run: RunFolder, settings: dict[str, Any], console: Console) -> None:
    """Sample responses to prompts. Writes responses.jsonl."""
    console.run_stage("respond", open_run(run, settings), _respond_lines)


@verb(sample_app)
def resample(run: RunFolder, settings: dict[str, Any], console: Console) -> None:
    """Sample responses of RUN/sft. Writes resampled.jsonl, which `aif compare` then pairs."""
    console.run_stage("resample", existing_run(run, settings), _respond_lines)


def _respond_lines(summary: dict[str, Any]) -> list[str]:
    faults = sum(summary["faults"].values())
    return [
        f"{summary['responses']:,} responses to {summary['prompts']:,} prompts "
        f"({faults:,} faults), {summary['calls_made']:,} calls",
        f"{summary['run']}/{summary['file']}",
    ]


@verb(sample_app)
def vote(run: RunFolder, settings: dict[str, Any], console: Console) -> None:
    """Vote on the final answers of responses. Writes votes.jsonl and makes no call."""
    console.run_stage("vote", existing_run(run, settings), _vote_lines)


def _vote_lines(summary: dict[str, Any]) -> list[str]:
    none = f" (none: {counts(summary['faults'])})" if summary["faults"] else ""
    lines = [
        f"{summary['votes']:,} votes on {summary['prompts']:,} prompts{none}, "
        f"{summary['responses_kept']:,} responses kept"
    ]
    if summary.get("prompts_with_gold"):
        lines.append(
            f"right, where the answer is known: {summary['accuracy_vote']:.1%} of votes, "
            f"{summary['accuracy_single']:.1%} of single responses"
        )
    return [*lines, f"{summary['run']}/votes.jsonl"]


@verb(sample_app)
def compare(run: RunFolder, settings: dict[str, Any], console: Console) -> None:
    """Pair up the responses to each prompt. Writes comparisons.jsonl and makes no call."""
    run_ = existing_run(run, settings)
    console.run_stage("compare", run_, lambda summary: [f"{summary['run']}/comparisons.jsonl"])
