"""`aif audit`: which judge to trust."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aif.cli import render_audit
from aif.cli.options import (
    BaseUrl,
    Concurrency,
    ConstitutionFile,
    FaultRate,
    Json,
    Limit,
    Protocol,
    Quiet,
    Seed,
    Set,
    open_run,
    show_summary,
    verb,
)

audit_app = typer.Typer()

Runs = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[RUN]...", help="Runs whose labels are audited as they are."),
]
HumanPairs = Annotated[
    str | None, typer.Option(help="Pairs with people's choices: JSONL, or hf:NAME[:SPLIT].")
]
Judges = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="A judge as `aif label` takes it, or recorded:COLUMN, whose verdicts stand in the "
        "pairs; repeatable.",
    ),
]


@verb(audit_app)
def audit(
    runs: Runs = None,
    pairs: HumanPairs = None,
    constitution: ConstitutionFile = None,
    judge: Judges = None,
    base_url: BaseUrl = None,
    protocol: Protocol = None,
    concurrency: Concurrency = None,
    canaries: Annotated[
        int | None, typer.Option(metavar="N", help="Attack N pairs of each judge; costs calls.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Fit a temperature on half of the prompts.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder; default: the first RUN, or else runs/audit."),
    ] = None,
    limit: Limit = None,
    seed: Seed = None,
    max_fault_rate: FaultRate = None,
    set_: Set = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Hold judges against people, side by side. Writes audit.json.

    Every judge labels the pairs in a folder of its own, and no answer is paid for twice. Labels of
    RUNs and recorded verdicts are taken as they are.
    """
    from aif.auditing.audit import audit as audited
    from aif.llm.dispatch import check_faults
    from aif.progress import Progress

    out = out or (runs[0] if runs else Path("runs/audit"))
    # A folder without labels of its own is one where judges were asked: its run.toml says whom.
    labelled = [str(run) for run in runs or () if run != out or (run / "labels.jsonl").exists()]
    given = {
        "audit.pairs": pairs,
        "audit.judges": judge,
        "audit.runs": labelled or None,
        "audit.canaries": canaries,
        "audit.calibrate": calibrate or None,
        "audit.seed": seed,
        "label.constitution": constitution,
        "judge.base_url": base_url,
        "label.protocol": protocol,
        "judge.concurrency": concurrency,
        "label.limit": limit,
        "label.max_fault_rate": max_fault_rate,
    }
    run = open_run(out, given, set_)
    with Progress(quiet) as progress:
        summary = audited(run, progress)
    show_summary(summary, json_, quiet, render_audit.audit)
    check_faults(summary, run.settings.label.max_fault_rate)
