"""`aif batches`: the batches of a run at a Batch API."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from aif.cli.options import BASE_URL, Console, RunFolder, existing_run, verb

batches_app = typer.Typer()


@verb(batches_app, BASE_URL, quiet=False)
def batches(
    run: RunFolder,
    *,
    cancel: Annotated[bool, typer.Option("--cancel", help="Ask the server to stop them.")] = False,
    settings: dict[str, Any],
    console: Console,
) -> None:
    """List the batches of openai-batch: models whose answers are not in yet.

    The answers of a cancelled batch are paid for; the next command that needs them uses them.
    """
    from aif.llm.batches import list_batches

    console.show(list_batches(existing_run(run, settings), cancel), _lines)


def _lines(summary: dict[str, Any]) -> list[str]:
    lines = [
        f"{row['stage']}: {row['batch'] or 'a batch'} of {row['model']}, "
        f"{row['requests']:,} requests, {row['status']}"
        for row in summary["batches"]
    ]
    return lines or ["no batches"]
