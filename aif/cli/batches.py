"""`aif batches`: what a run has at a Batch API."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from aif.cli.options import BaseUrl, Json, RunFolder, Set, existing_run, show_summary, verb

batches_app = typer.Typer()


@verb(batches_app)
def batches(
    run: RunFolder,
    cancel: Annotated[bool, typer.Option("--cancel", help="Have the server stop them.")] = False,
    base_url: BaseUrl = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """List the batches of openai-batch: models whose answers are not in yet.

    What a cancelled batch has answered is paid for, and taken by the next command that wants it.
    """
    from aif.llm.batches import batches as listed

    opened = existing_run(run, set_, {"judge.base_url": base_url})
    show_summary(listed(opened, cancel), json_, False, _lines)


def _lines(summary: dict[str, Any]) -> list[str]:
    lines = [
        f"{row['stage']}: {row['batch'] or 'a batch'} of {row['model']}, "
        f"{row['requests']:,} requests, {row['status']}"
        for row in summary["batches"]
    ]
    return lines or ["no batches"]
