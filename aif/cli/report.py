"""`aif report`: a run as one page."""

from __future__ import annotations

from typing import Any

import typer

from aif.cli.options import Json, Quiet, RunFolder, existing_run, show_summary, verb

report_app = typer.Typer()


@verb(report_app)
def report(run: RunFolder, json_: Json = False, quiet: Quiet = False) -> None:
    """Write a run's report.html: judge, labels, training, evaluation, and a browser of the texts.

    Reads the run's files and asks no model. The page stands alone and works without a network.
    """
    from aif.progress import Progress
    from aif.report import report as written

    with Progress(quiet) as progress:
        summary = written(existing_run(run), progress)
    show_summary(summary, json_, quiet, _told)


def _told(summary: dict[str, Any]) -> list[str]:
    lines = [f"{', '.join(summary['parts'])}; {summary['bytes'] / 1e6:.1f} MB"]
    for kind, (here, every) in summary["browsed"].items():
        if here < every:
            lines.append(f"{here:,} of {every:,} {kind} are on the page, drawn by seed")
    return [*lines, summary["file"]]
