"""`aif evaluate`: policies against each other."""

from __future__ import annotations

from typing import Annotated

import typer

from aif.cli import render_evaluate
from aif.cli.options import (
    ConstitutionFile,
    Json,
    Judge,
    Limit,
    Quiet,
    RunFolder,
    Set,
    run_stage,
    training_run,
    verb,
)

evaluate_app = typer.Typer()


@verb(evaluate_app)
def evaluate(
    run: RunFolder,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="base, sft, ppo, 2/ppo, best-of-4, reference (the prompts' own responses), "
            "runs/other:ppo or any model; repeatable. Default: all that the run has.",
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="NAME", help="Default: sft, or else base.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="JSONL with `prompt`, or hf:NAME; default: those `aif ppo` held out."),
    ] = None,
    human: Annotated[
        str | None, typer.Option(help="Pairs with people's choices, to hold the judge against.")
    ] = None,
    constitution: ConstitutionFile = None,
    judge: Judge = None,
    limit: Limit = None,
    set_: Set = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Hold policies against each other by the judge. Writes evaluate.json and evaluation.jsonl.

    Every answer is kept in RUN/evaluation: run again with another policy, it asks about that one
    alone.
    """
    from aif.llm.dispatch import check_faults

    given = {
        "evaluate.policies": policy,
        "evaluate.against": against,
        "evaluate.prompts": prompts,
        "evaluate.human": human,
        "evaluate.limit": limit,
        "label.constitution": constitution,
        "judge.model": judge,
    }
    opened = training_run(run, set_, given, [prompts] if prompts else None)
    summary = run_stage("evaluate", opened, json_, quiet, render_evaluate.evaluate)
    check_faults(summary, opened.settings.label.max_fault_rate)
