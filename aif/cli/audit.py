"""`aif audit`: which judge to trust, as a table of judges that fits 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from aif.cli.options import (
    BASE_URL,
    CONCURRENCY,
    CONSTITUTION,
    PROTOCOL,
    Console,
    Flag,
    limit,
    max_fault_rate,
    open_run,
    seed,
    verb,
)
from aif.cli.render import counts, interval, mean, number, table_row, tokens
from aif.data.visible import visible

audit_app = typer.Typer()

NAME = 18  # columns for a name
HEAD = (
    f"{'':{NAME}} {'agree':>5} {'95 %':9} {'kappa':>5} {'same':>5} {'swap':>5} {'pos':>5} "
    f"{'long':>5} {'fault':>5} {'n':>6}"
)
KEY = (
    "agree: with people, where they name a winner; same: of all pairs, the same of win, loss and "
    "tie; swap: the same winner in both orders; pos: more verdicts for the first shown than for "
    "the second; long: how often the longer response wins; fault: calls without a verdict."
)


@verb(
    audit_app,
    Flag("--pairs", "audit.pairs", str, "Pairs with people's choices: JSONL or hf:NAME[:SPLIT]."),
    CONSTITUTION,
    Flag(
        "--judge", "audit.judges", list[str],
        "A judge as for `aif label`, or recorded:COLUMN for verdicts in the pairs; repeatable.",
        "NAME",
    ),
    BASE_URL,
    PROTOCOL,
    CONCURRENCY,
    Flag("--canaries", "audit.canaries", int, "Attack N pairs of each judge; costs calls.", "N"),
    Flag("--calibrate", "audit.calibrate", bool, "Fit a temperature on half of the prompts."),
    limit("label"),
    seed("audit"),
    max_fault_rate("label"),
)  # fmt: skip
def audit(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN]...", help="Runs whose labels are audited as they are."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder; default: the first RUN, or runs/audit.")
    ] = None,
    *,
    settings: dict[str, Any],
    console: Console,
) -> None:
    """Compare judges with people and with each other. Writes audit.json.

    Every judge labels the pairs in a folder of its own, and no answer is paid for twice. Labels of
    RUNs and recorded verdicts are taken as they are.
    """
    from aif.auditing.audit import audit as audited
    from aif.llm.dispatch import check_faults

    out = out or (runs[0] if runs else Path("runs/audit"))
    # A folder without labels is an earlier audit's own: its run.toml says which judges it asked.
    labelled = [str(run) for run in runs or () if run != out or (run / "labels.jsonl").exists()]
    run = open_run(out, ({"audit.runs": labelled} if labelled else {}) | settings)
    with console.progress() as progress:
        summary = audited(run, progress)
    console.show(summary, audit_lines)
    check_faults(summary, run.settings.label.max_fault_rate)


def audit_lines(summary: Mapping[str, Any]) -> list[str]:
    """How far each judge agrees with people, what it leans to, and what it cost."""
    judges = summary["judges"]
    lines = [*_people(summary), HEAD, *(line for card in judges for line in _card(card))]
    if summary["alpha"] is not None:
        lines.append(f"Krippendorff's alpha across judges {summary['alpha']:.2f}")
    for card in judges:
        lines += ["", visible(card["name"]), *(f"  {line}" for line in _more(card))]
    return [*lines, "", *textwrap.wrap(KEY, 78), f"{summary['run']}/audit.json"]


def _people(summary: Mapping[str, Any]) -> Iterator[str]:
    rows, people, split = (summary[key] for key in ("rows", "people", "split"))
    line = f"{rows:,} pairs, {people:,} with a choice of people"
    yield line + (f", {split:,} on which they are split" if split else "")
    if annotators := summary["annotators"]:
        share, alpha = _share(annotators["agreement"]), number(annotators["alpha"])
        yield f"people among themselves: {share} the same, alpha {alpha}"
    if longer := summary["longer_wins"]:
        yield f"the longer response wins {_share(longer)} by people"


def _card(card: Mapping[str, Any]) -> Iterator[str]:
    yield from _row(visible(card["name"]), card)
    for parts in (card["by_principle"], card["by_subset"]):
        if len(parts) > 1:
            for name, part in parts.items():
                yield from _row(f"  {visible(name)}", part)


def _row(name: str, part: Mapping[str, Any]) -> list[str]:
    agree, position = part["agreement"], part["position"] or {}
    cells = (
        f"{mean(agree):>5} {interval(agree):9} {number(part['kappa']):>5} "
        f"{mean(part['exact']):>5} {mean(position.get('consistency')):>5} "
        f"{number(position.get('bias'), '+z.2f'):>5} {mean(part['longer_wins']['judge']):>5} "
        f"{number(part['fault_rate']):>5} {agree['n']:>6,}"
    )
    return table_row(name, cells, NAME)


def _more(card: Mapping[str, Any]) -> Iterator[str]:
    """What a judge's row has no room for."""
    no_winner = card["null"] | {"not labelled": card["unlabelled"], "ties": card["ties"]}
    if no_winner := {kind: n for kind, n in no_winner.items() if n}:
        yield f"no winner: {counts(no_winner)}"
    if even := card["at_equal_length"]:
        yield f"at equal length it would agree {_share(even)}"
    if own := card["self_preference"]:
        yield (
            f"its own responses win {_share(own['judge'])}, by people {_share(own['people'])} "
            f"({own['judge']['n']:,} pairs)"
        )
    if calibration := card["calibration"]:
        yield f"calibration error {calibration['ece']:.3f}"
    if scaled := card["temperature"]:
        yield (
            f"with temperature {scaled['temperature']:.2f} it is {scaled['ece']:.3f} "
            f"on {scaled['n']:,} others, without it {scaled['ece_before']:.3f}"
        )
    yield from _cost(card["cost"])
    for kind, rate in card.get("canaries", {}).items():
        n, null = rate["rate"]["n"], rate["null"]
        flips = f"{rate['flips']:,} of {n:,} flip" if n else "no verdict"
        yield f"canary {kind:9} {flips}{f', {null:,} null' if null else ''}"


def _cost(cost: Mapping[str, Any] | None) -> Iterator[str]:
    if cost is None:
        return
    yield counts({"calls": cost["calls"]} | tokens(cost["tokens"]))
    if cost["seconds"]:
        rate = cost["calls_timed"] / cost["seconds"]
        yield f"{cost['seconds']:,.0f} s for {cost['calls_timed']:,} of its calls, {rate:,.1f}/s"


def _share(estimate: Mapping[str, Any]) -> str:
    low, high = estimate["low"], estimate["high"]
    return mean(estimate) + ("" if low is None else f" ({low:.2f} to {high:.2f})")
