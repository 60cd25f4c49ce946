"""The verbs that train a model."""

from __future__ import annotations

from typing import Annotated

import typer

from aif.cli import render
from aif.cli.options import (
    ConstitutionFile,
    Json,
    Judge,
    Quiet,
    RunFolder,
    Seed,
    Set,
    existing_run,
    parse_source,
    run_stage,
    show_summary,
    training_run,
    verb,
)

train_app = typer.Typer()


@verb(train_app)
def sft(
    run: RunFolder,
    model: Annotated[str | None, typer.Option(help="To start from; default: the policy.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE[=WEIGHT]",
            help="revisions, votes, responses, a JSONL file or hf:NAME[:SPLIT]; repeatable. "
            "WEIGHT: how often an epoch shows each row.",
        ),
    ] = None,
    seed: Seed = None,
    set_: Set = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune on revisions and demonstrations. Writes the model to RUN/sft.

    Stopped and started again it ends with the same weights as if it had not been stopped.
    """
    given = {
        "sft.model": model,
        "sft.data": dict(map(parse_source, data)) if data else None,
        "sft.seed": seed,
    }
    run_stage("sft", training_run(run, set_, given, data), json_, quiet, render.sft)


@verb(train_app)
def reward(
    run: RunFolder,
    model: Annotated[
        str | None, typer.Option(help="To start from; default: RUN/sft, else the policy.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE[=WEIGHT]",
            help="labels (the run's), a JSONL file of pairs with a choice or hf:NAME[:SPLIT]; "
            "repeatable. WEIGHT: how often an epoch shows each prompt.",
        ),
    ] = None,
    seed: Seed = None,
    set_: Set = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a reward model on the labels. Writes it to RUN/reward, with a report card.

    Stopped and started again it ends with the same weights as if it had not been stopped.
    """
    given = {
        "reward.model": model,
        "reward.data": dict(map(parse_source, data)) if data else None,
        "reward.seed": seed,
    }
    run_stage("reward", training_run(run, set_, given, data), json_, quiet, render.reward)


@verb(train_app)
def score(
    run: RunFolder,
    pairs: Annotated[str, typer.Option(help="JSONL of pairs, or hf:NAME[:SPLIT].")],
    set_: Set = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score pairs with the reward model. Writes scores.jsonl, and tells how often the scores agree
    with the choices in the file."""
    from aif.progress import Progress
    from aif.train.reward.score import score as scored

    opened = existing_run(run, set_)
    with Progress(quiet) as progress:
        summary = scored(opened, progress, pairs)
    show_summary(summary, json_, quiet, render.score)


@verb(train_app)
def ppo(
    run: RunFolder,
    model: Annotated[
        str | None, typer.Option(help="To start from; default: RUN/sft, else the policy.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="JSONL with `prompt`, or hf:NAME; default: the run's.")
    ] = None,
    reward_: Annotated[
        list[str] | None,
        typer.Option(
            "--reward",
            metavar="SOURCE[=WEIGHT]",
            help="model (RUN/reward), judge (the run's, asked live) or MODULE:FUNCTION; "
            "repeatable, summed by weight.",
        ),
    ] = None,
    gold: Annotated[
        str | None, typer.Option(help="judge or MODULE:FUNCTION; watched, not learned from.")
    ] = None,
    constitution: ConstitutionFile = None,
    judge: Judge = None,
    seed: Seed = None,
    set_: Set = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the policy on a reward by PPO. Writes it to RUN/ppo, its critic to RUN/ppo-critic.

    Stopped and started again it ends with the same weights as if it had not been stopped.
    """
    given = {
        "ppo.model": model,
        "ppo.prompts": prompts,
        "ppo.reward": dict(map(parse_source, reward_)) if reward_ else None,
        "ppo.gold": gold,
        "label.constitution": constitution,
        "judge.model": judge,
        "ppo.seed": seed,
    }
    opened = training_run(run, set_, given, [prompts] if prompts else None)
    run_stage("ppo", opened, json_, quiet, render.ppo)
