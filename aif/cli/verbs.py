"""The verbs. Each imports its stage when it runs, so that `aif --help` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aif.cli import render
from aif.cli.audit import audit_app
from aif.cli.batches import batches_app
from aif.cli.constitution import constitution_app
from aif.cli.diff import diff_app
from aif.cli.evaluate import evaluate_app
from aif.cli.options import (
    EPILOG,
    BaseUrl,
    Budget,
    Concurrency,
    Consensus,
    ConstitutionFile,
    FaultRate,
    Json,
    Judge,
    Judges,
    Limit,
    Out,
    Pairs,
    Prices,
    Protocol,
    Quiet,
    RunFolder,
    Seed,
    Set,
    existing_run,
    judges_given,
    open_run,
    run_stage,
    show_summary,
    verb,
)
from aif.cli.report import report_app
from aif.cli.run import run_app
from aif.cli.train import train_app

app = typer.Typer(
    help="Label preferences with an LLM judge under a constitution you edit.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(train_app)
app.add_typer(audit_app)
app.add_typer(diff_app)
app.add_typer(evaluate_app)
app.add_typer(report_app)
app.add_typer(run_app)
app.add_typer(batches_app)
app.add_typer(constitution_app, name="constitution")


def label_settings(
    pairs: str | None,
    constitution: str | None,
    base_url: str | None,
    protocol: str | None,
    concurrency: int | None,
    limit: int | None,
    seed: int | None,
    max_fault_rate: float | None = None,
    budget: float | None = None,
    consensus: str | None = None,
) -> dict[str, Any]:
    """The flags of `label` and `plan` under the names they have in run.toml."""
    return {
        "label.pairs": pairs,
        "label.constitution": constitution,
        "judge.base_url": base_url,
        "label.protocol": protocol,
        "judge.concurrency": concurrency,
        "label.limit": limit,
        "label.seed": seed,
        "label.max_fault_rate": max_fault_rate,
        "label.budget": budget,
        "label.consensus": consensus,
    }


@verb(app)
def label(
    out: Out,
    pairs: Pairs = None,
    constitution: ConstitutionFile = None,
    judge: Judges = None,
    consensus: Consensus = None,
    base_url: BaseUrl = None,
    protocol: Protocol = None,
    concurrency: Concurrency = None,
    limit: Limit = None,
    seed: Seed = None,
    max_fault_rate: FaultRate = None,
    price: Prices = None,
    budget: Budget = None,
    set_: Set = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Label pairs of responses under a constitution.

    Writes verdicts.jsonl (one row a call) and labels.jsonl (one row a pair) to the run folder.
    Run again with an edited constitution, another judge or more data, it asks only what is new.
    """
    from aif.llm.dispatch import check_faults

    given = judges_given(judge, price, out) | label_settings(
        pairs, constitution, base_url, protocol, concurrency, limit, seed, max_fault_rate,
        budget, consensus,
    )  # fmt: skip
    run = open_run(out, given, set_)
    summary = run_stage("label", run, json_, quiet, render.label)
    check_faults(summary, run.settings.label.max_fault_rate)


@verb(app)
def plan(
    out: Out = Path("runs/plan"),
    pairs: Pairs = None,
    constitution: ConstitutionFile = None,
    judge: Judges = None,
    consensus: Consensus = None,
    base_url: BaseUrl = None,
    protocol: Protocol = None,
    concurrency: Concurrency = None,
    limit: Limit = None,
    seed: Seed = None,
    max_fault_rate: FaultRate = None,
    price: Prices = None,
    budget: Budget = None,
    rate: Annotated[
        float | None, typer.Option(min=1e-6, help="Calls a second; default: as last measured.")
    ] = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Say what `label` would do and cost. Takes the same arguments.

    Asks nothing and writes nothing.
    """
    from aif.planning import plan as planned

    given = judges_given(judge, price, out) | label_settings(
        pairs, constitution, base_url, protocol, concurrency, limit, seed, max_fault_rate,
        budget, consensus,
    )  # fmt: skip
    show_summary(planned(open_run(out, given, set_), rate), json_, False, render.plan)


@verb(app)
def respond(
    run: RunFolder,
    prompts: Annotated[str | None, typer.Option(help="JSONL with `prompt`, or hf:NAME.")] = None,
    shots: Annotated[str | None, typer.Option(help="JSONL of examples to put before.")] = None,
    policy: Annotated[str | None, typer.Option(help="The model, named as a judge is.")] = None,
    samples: Annotated[int | None, typer.Option(help="Responses a prompt.")] = None,
    seed: Seed = None,
    limit: Limit = None,
    set_: Set = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Sample responses to prompts. Writes responses.jsonl."""
    given = {
        "respond.prompts": prompts,
        "respond.shots": shots,
        "policy.model": policy,
        "respond.samples": samples,
        "respond.seed": seed,
        "respond.limit": limit,
    }
    run_stage("respond", open_run(run, given, set_), json_, quiet, render.respond)


@verb(app)
def revise(
    run: RunFolder,
    constitution: ConstitutionFile = None,
    rounds: Annotated[int | None, typer.Option(help="Critiques and revisions each.")] = None,
    reviser: Annotated[str | None, typer.Option(help="The model; default: the policy.")] = None,
    base_url: Annotated[str | None, typer.Option(help="Server of an openai: reviser.")] = None,
    seed: Seed = None,
    limit: Limit = None,
    max_fault_rate: FaultRate = None,
    set_: Set = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Critique and revise responses. Writes revisions.jsonl, a principle a round.

    Every round is kept. Run again with an edited principle, it asks again only from the first
    round on that used it.
    """
    from aif.llm.dispatch import check_faults

    given = {
        "revise.constitution": constitution,
        "revise.rounds": rounds,
        "reviser.model": reviser,
        "reviser.base_url": base_url,
        "revise.seed": seed,
        "revise.limit": limit,
        "revise.max_fault_rate": max_fault_rate,
    }
    opened = existing_run(run, set_, given)
    summary = run_stage("revise", opened, json_, quiet, render.revise)
    check_faults(summary, opened.settings.revise.max_fault_rate)


@verb(app, "filter")
def filter_(
    run: RunFolder,
    constitution: ConstitutionFile = None,
    judge: Judge = None,
    base_url: BaseUrl = None,
    max_fault_rate: FaultRate = None,
    set_: Set = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Keep revisions that the judge prefers. Writes kept.jsonl."""
    from aif.llm.dispatch import check_faults

    given = {
        "label.constitution": constitution,
        "judge.model": judge,
        "judge.base_url": base_url,
        "label.max_fault_rate": max_fault_rate,
    }
    opened = existing_run(run, set_, given)
    summary = run_stage("filter", opened, json_, quiet, render.filter)
    check_faults(summary, opened.settings.label.max_fault_rate)


@verb(app)
def vote(run: RunFolder, set_: Set = None, json_: Json = False, quiet: Quiet = False) -> None:
    """Vote on the answers of responses. Writes votes.jsonl and asks nothing."""
    run_stage("vote", existing_run(run, set_), json_, quiet, render.vote)


@verb(app)
def resample(run: RunFolder, set_: Set = None, json_: Json = False, quiet: Quiet = False) -> None:
    """Sample responses of RUN/sft. Writes resampled.jsonl, which `compare` then takes."""
    run_stage("resample", existing_run(run, set_), json_, quiet, render.respond)


@verb(app)
def compare(run: RunFolder, set_: Set = None, json_: Json = False, quiet: Quiet = False) -> None:
    """Pair up a prompt's responses. Writes comparisons.jsonl and asks nothing."""
    opened = existing_run(run, set_)
    run_stage("compare", opened, json_, quiet, lambda s: [f"{s['run']}/comparisons.jsonl"])


@verb(app)
def export(
    run: RunFolder,
    format: Annotated[str, typer.Option("--format", help="trl, hh or dataset.")] = "trl",
    to: Annotated[Path | None, typer.Option(help="Where to; default: export/ in the run.")] = None,
    json_: Json = False,
) -> None:
    """Write the labels in a shape that other trainers read."""
    from aif.stages.export import export as write

    def lines(summary: dict[str, Any]) -> list[str]:
        left = ", ".join(f"{n:,} {why}" for why, n in summary["left_out"].items())
        return [f"{summary['rows']:,} rows{f'; left out: {left}' if left else ''}", summary["file"]]

    show_summary(write(existing_run(run), format, to), json_, False, lines)


def main() -> None:
    """The `aif` command."""
    app()
