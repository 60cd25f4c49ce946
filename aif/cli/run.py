"""The verbs for a run as a whole."""

from __future__ import annotations

from typing import Annotated

import typer

from aif.cli.options import Budget, Json, Quiet, RunFolder, Set, existing_run, show_summary, verb

run_app = typer.Typer()
From = Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Begin with it.")]
Until = Annotated[str | None, typer.Option(metavar="STAGE", help="End with it.")]
Within = Annotated[
    float | None,
    typer.Option(
        metavar="MINUTES",
        help="If the run is expected to take longer, do nothing and exit with 5.",
    ),
]
Only = Annotated[str | None, typer.Option(metavar="STAGE", help="Do it alone.")]


@verb(run_app, "run")
def run_(
    run: RunFolder,
    from_: From = None,
    until: Until = None,
    only: Only = None,
    budget: Budget = None,
    within: Within = None,
    set_: Set = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Do all stages of a run in their order, as run.toml says.

    Run again, it does what is missing or has changed: a stage whose inputs are as they were is
    passed over.
    """
    from aif.cli.render_run import lines
    from aif.forecast import check_time, forecast
    from aif.forecast import lines as forecast_lines
    from aif.pipeline import chosen, remaining, run_all, steps
    from aif.progress import Progress

    opened = existing_run(run, set_, {"pipeline.budget": budget})
    todo = chosen(steps(opened), from_, until, only)
    with Progress(quiet) as progress:
        left = remaining(todo)
        expected_s = {} if quiet and within is None else forecast(opened, left, progress)
        check_time(expected_s, within, f"aif run {run}")
        for line in forecast_lines(expected_s):
            progress.say(line)
        summary = run_all(todo, progress, expected_s)
    show_summary(summary, json_, quiet, lambda _: lines(opened, summary))


@verb(run_app)
def status(run: RunFolder, json_: Json = False) -> None:
    """Say where a run stands, and what is next."""
    from aif.status import lines
    from aif.status import status as found

    show_summary(found(existing_run(run)), json_, False, lines)
