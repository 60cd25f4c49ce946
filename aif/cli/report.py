"""`aif report`: a run as one page."""

from __future__ import annotations

from typing import Any

import typer

from aif.cli.options import Console, RunFolder, existing_run, verb

report_app = typer.Typer()


@verb(report_app)
def report(run: RunFolder, console: Console) -> None:
    """Write report.html: the judge, labels, training, evaluation, and a browser of the texts.

    Reads the run's files and makes no call. The page is one file and needs no network.
    """
    from aif.report import report as written

    with console.progress() as progress:
        summary = written(existing_run(run), progress)
    console.show(summary, _lines)


def _lines(summary: dict[str, Any]) -> list[str]:
    lines = [f"{', '.join(summary['parts'])}; {summary['bytes'] / 1e6:.1f} MB"]
    for kind, (here, every) in summary["browsed"].items():
        if here < every:
            lines.append(f"{here:,} of {every:,} {kind} are on the page, drawn by seed")
    return [*lines, summary["file"]]
