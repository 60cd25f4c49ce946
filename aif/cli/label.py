"""`aif label` and `aif plan`: label pairs, and what that will cost; `aif export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aif.cli.options import (
    BASE_URL,
    CONCURRENCY,
    CONSTITUTION,
    PAIRS,
    PROTOCOL,
    Console,
    Flag,
    Judges,
    Out,
    RunFolder,
    budget,
    existing_run,
    judge_settings,
    limit,
    max_fault_rate,
    open_run,
    seed,
    verb,
)
from aif.cli.render import counts
from aif.config.price import dollars
from aif.progress import duration

label_app = typer.Typer()

Prices = Annotated[
    list[str] | None,
    typer.Option(
        "--price",
        metavar="IN/OUT",
        help="Dollars per million prompt and completion tokens, as 0.15/0.60; one for each "
        "--judge. For openai-batch: the price of a batch, often half.",
    ),
]
LABEL = (
    PAIRS,
    CONSTITUTION,
    Flag("--consensus", "label.consensus", str, "A panel's rule: mean, majority or unanimous."),
    BASE_URL,
    PROTOCOL,
    CONCURRENCY,
    limit("label"),
    seed("label"),
    max_fault_rate("label"),
    budget("label"),
)


@verb(label_app, *LABEL)
def label(
    out: Out,
    *,
    judge: Judges = None,
    price: Prices = None,
    settings: dict[str, Any],
    console: Console,
) -> None:
    """Label pairs of responses under a constitution.

    Writes verdicts.jsonl (one row a call) and labels.jsonl (one row a pair) to the run folder.
    A second call with an edited constitution, another judge or more data asks only what is new.
    """
    run = open_run(out, judge_settings(judge, price, out) | settings)
    console.run_stage("label", run, label_lines)


def label_lines(summary: dict[str, Any]) -> list[str]:
    """Labels, calls and faults."""
    from aif.store.records import FAULTS

    null = sum(summary["labels_null"].values())
    lines = [
        f"{summary['labels']:,} labels ({null:,} null), {summary['calls_made']:,} calls made, "
        f"{summary['calls_kept']:,} kept, {sum(summary['faults'].values()):,} faults"
    ]
    if summary.get("cost"):
        lines.append(f"{dollars(summary['cost'])} for these calls")
    for name, one in summary.get("judges", {}).items():
        lines.append(f"  {name}: {one.get('labels', 0):,} labels ({one.get('null', 0):,} null)")
    for fault in ("tied", "no_consensus"):
        if number := summary["labels_null"].get(fault):
            lines.append(f"{number:,} labels are null as {FAULTS[fault]}")
    if more := summary.get("escalated"):
        saved = 1 - more["calls"] / max(1, more["calls_of_all"])
        lines.append(
            f"{more['comparisons']:,} comparisons got more than the cheap pass: {more['calls']:,} "
            f"calls of the {more['calls_of_all']:,} that all would take ({saved:.0%} saved)"
        )
    if summary["hard_verdicts"]:
        lines.append(
            f"{summary['hard_verdicts']:,} verdicts are parsed text, not log-probabilities: "
            "their labels are coarse (judge.samples = n makes them finer)"
        )
    if repeated := summary["data"].get("repeated_rows"):
        lines.append(f"{repeated:,} rows repeat another and share its label")
    return [*lines, f"{summary['run']}/labels.jsonl"]


@verb(label_app, *LABEL, quiet=False)
def plan(
    out: Out = Path("runs/plan"),
    *,
    judge: Judges = None,
    price: Prices = None,
    rate: Annotated[
        float | None,
        typer.Option(min=1e-6, help="Calls per second; the default is the last measured rate."),
    ] = None,
    settings: dict[str, Any],
    console: Console,
) -> None:
    """Say what `aif label` would do and cost. Takes the same options.

    It makes no call and writes nothing.
    """
    from aif.planning import plan as planned

    run = open_run(out, judge_settings(judge, price, out) | settings)
    console.show(planned(run, rate), plan_lines)


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """What a labelling would cost."""
    lines = [f"{name}: {n:,} calls at most" for name, n in plan["sampling"].items()]
    lines += [
        f"{plan['comparisons']:,} comparisons, {plan['protocol']} by {plan['judge']}",
        f"{plan['calls']:,} calls to make, {plan['calls_kept']:,} answers kept, "
        f"{plan['answers_unused']:,} no longer used",
        f"{plan['prompt_tokens']:,} prompt tokens ({plan['prompt_tokens_are']}), "
        f"at most {plan['completion_tokens_at_most']:,} to generate",
    ]
    if plan["calls_perhaps"]:
        lines.insert(-1, f"  and {plan['calls_perhaps']:,} more at most, as answers call for them")
    lines += [f"  {name}: {n:,} calls" for name, n in plan["calls_by_principle"].items()]
    if len(plan["judges"]) > 1:
        lines += [f"  {judge['judge']}: {judge['calls']:,} calls" for judge in plan["judges"]]
    if plan["seconds"] is not None:
        rate = plan["calls_per_s"]
        lines.append(f"about {duration(plan['seconds'])} at {rate:,.3g} calls a second")
    return [*plan["changes"], *lines, *_prices(plan)]


def _prices(plan: dict[str, Any]) -> list[str]:
    """What there is to pay, what has been paid, and how far the budgets go."""
    lines = [
        f"{stage}: {dollars(cost['at_most'])} at most"
        for stage, cost in plan["dollars_of_sampling"].items()
    ]
    cost = plan["dollars"]
    if cost["at_most"] is not None:
        about, most = dollars(cost["about"]), dollars(cost["at_most"])
        about = f"{about} at most" if about == most else f"about {about}, {most} at most"
        lines.append(f"to pay: {about}; paid: {dollars(plan['dollars_paid'])}")
        unpriced = [judge["judge"] for judge in plan["judges"] if judge["price"] is None]
        lines += [f"  without {', '.join(unpriced)}, whose price is not known"] if unpriced else []
    elif plan["dollars_paid"]:
        lines.append(f"paid: {dollars(plan['dollars_paid'])}")
    return lines + [_covered(budget) for budget in plan["budgets"]]


def _covered(budget: dict[str, Any]) -> str:
    left = max(0.0, budget["dollars"] - budget["spent"])
    if left >= budget["at_most"]:
        covers = "covers all of it"
    elif left >= budget["about"]:
        covers = "is likely to cover it"
    else:
        covers = f"covers about {left / budget['about']:.0%} of it"
    spent = f", {dollars(budget['spent'])} of it spent" if budget["spent"] else ""
    return f"the budget of {dollars(budget['dollars'])} ({budget['setting']}{spent}) {covers}"


@verb(label_app, quiet=False)
def export(
    run: RunFolder,
    *,
    format: Annotated[str, typer.Option(help="The format: trl, hh or dataset.")] = "trl",
    to: Annotated[
        Path | None, typer.Option(help="The file or folder to write; default: in RUN/export.")
    ] = None,
    console: Console,
) -> None:
    """Write the labels in a format that other trainers read."""
    from aif.stages.export import export as write

    console.show(write(existing_run(run), format, to), _export_lines)


def _export_lines(summary: dict[str, Any]) -> list[str]:
    left_out = f"; left out: {counts(summary['left_out'])}" if summary["left_out"] else ""
    return [f"{summary['rows']:,} rows{left_out}", summary["file"]]
