"""`aif diff`: what flipped between two labellings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aif.cli.options import (
    BaseUrl,
    ConstitutionFile,
    Json,
    Judges,
    Protocol,
    Set,
    existing_run,
    judges_given,
    show_summary,
    verb,
)

diff_app = typer.Typer()


@verb(diff_app)
def diff(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run folder.")],
    run_b: Annotated[
        Path | None, typer.Argument(metavar="[RUN_B]", help="Another; see below for none.")
    ] = None,
    constitution: ConstitutionFile = None,
    judge: Judges = None,
    base_url: BaseUrl = None,
    protocol: Protocol = None,
    set_: Set = None,
    show: Annotated[int, typer.Option(min=0, help="How many flips to print.")] = 5,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where the flips go; default: RUN_B/diff.jsonl.")
    ] = None,
    json_: Json = False,
) -> None:
    """Say which labels flipped between two labellings, and why. Asks nothing.

    Without RUN_B, RUN_A's labels are held against what its settings, its constitution as it now
    stands and the flags given here make of the answers that it has paid for.
    """
    from aif.auditing.diff import diff as compared
    from aif.cli.render_diff import diff as told
    from aif.errors import InputError

    given = judges_given(judge, None, run_a) | {
        "label.constitution": constitution,
        "judge.base_url": base_url,
        "label.protocol": protocol,
    }
    if run_b and (set_ or judge or any(given.values())):
        raise InputError(
            "diff", "RUN_B", got=str(run_b), expected="none, with another constitution or judge"
        )
    other = existing_run(run_b) if run_b else None
    show_summary(compared(existing_run(run_a, set_, given), other, out, show), json_, False, told)
