"""`aif run` and `aif status`: a run as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aif.cli.evaluate import standing
from aif.cli.options import Console, RunFolder, budget, existing_run, verb
from aif.cli.render import counts, tokens
from aif.config.price import dollars
from aif.data.visible import visible
from aif.progress import duration

if TYPE_CHECKING:
    from aif.run import Run

run_app = typer.Typer()

SHOWN = 3  # prompts with their responses before and after
WIDTH = 240  # characters of a text
From = Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Start with STAGE.")]
Until = Annotated[str | None, typer.Option(metavar="STAGE", help="End with STAGE.")]
Within = Annotated[
    float | None,
    typer.Option(metavar="MINUTES", help="If it is expected to take longer, exit with 5 at once."),
]
Only = Annotated[str | None, typer.Option(metavar="STAGE", help="Do only STAGE.")]


@verb(run_app, budget("pipeline"), name="run")
def run_(
    run: RunFolder,
    *,
    from_: From = None,
    until: Until = None,
    only: Only = None,
    within: Within = None,
    settings: dict[str, Any],
    console: Console,
) -> None:
    """Do all stages of a run in their order, as run.toml says.

    A second call does what is missing or has changed: it skips a stage whose inputs are the same.
    """
    from aif.forecast import check_time, forecast
    from aif.pipeline import remaining, run_all, select, steps

    opened = existing_run(run, settings)
    todo = select(steps(opened), from_, until, only)
    with console.progress() as progress:
        left = remaining(todo)
        quiet = console.quiet and within is None
        expected_s = {} if quiet else forecast(opened, left, progress)
        check_time(expected_s, within, f"aif run {run}")
        for line in forecast_lines(expected_s):
            progress.say(line)
        summaries = run_all(todo, progress, expected_s)
    console.show(summaries, lambda summaries: run_lines(opened, summaries))


def forecast_lines(expected_s: Mapping[str, float | None]) -> list[str]:
    """The forecast, in one line; none if no step has one."""
    steps = {name: seconds for name, seconds in expected_s.items() if seconds is not None}
    if not steps:
        return []
    each = ", ".join(f"{name} {duration(seconds)}" for name, seconds in steps.items())
    others = [name for name in expected_s if name not in steps]
    without = f"; not known for {', '.join(others)}" if others else ""
    return [f"about {duration(sum(steps.values()))} on this machine ({each}){without}"]


def run_lines(run: Run, summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The stages that were done now, the policies' standing, and what they say before and after."""
    done = ", ".join(summaries) or "nothing, as nothing has changed"
    lines = [f"{run.path}: done: {done}"]
    evaluation = run.state("evaluate")
    if evaluation.get("policies"):
        lines += ["", *standing(evaluation), *_samples(run, evaluation)]
    report = run.file("report.html")
    return [*lines, "", str(report)] if report.exists() else lines


def _samples(run: Run, evaluation: Mapping[str, Any]) -> list[str]:
    """The first prompts with the responses of the baseline and of the policy that learned last."""
    from aif.store import jsonl
    from aif.store.records import Prompt

    learned = [one["name"] for one in evaluation["policies"] if one["name"].endswith("ppo")]
    path = run.file("evaluation.jsonl")
    if not learned or not path.exists():
        return []
    rows = (row for _, row in jsonl.read(path))
    texts = {(row["policy"], row["prompt_id"]): row["response"] for row in rows}
    lines = []
    for _, row in islice(jsonl.read(run.file("evaluation") / "prompts.jsonl"), SHOWN):
        prompt = Prompt.of(row["prompt"])
        lines += ["", f"> {_short(prompt.messages[-1]['content'])}"]
        for name in (evaluation["against"], learned[-1]):
            lines.append(f"  {name}: {_short(texts.get((name, prompt.id)))}")
    return lines


def _short(text: str | None) -> str:
    plain = visible(" ".join((text or "-").split()))
    return plain if len(plain) <= WIDTH else plain[: WIDTH - 1] + "…"


@verb(run_app, quiet=False)
def status(run: RunFolder, console: Console) -> None:
    """Say where a run stands, and what is next."""
    from aif.status import status as status_of

    console.show(status_of(existing_run(run)), status_lines)


def status_lines(summary: Mapping[str, Any]) -> list[str]:
    """A line a stage, and the command that comes next."""
    lines = [summary["run"]]
    for name in dict.fromkeys([*summary["due"], *summary["stages"]]):
        line = _stage(summary["stages"][name]) if name in summary["stages"] else "-"
        lines.append(f"  {name:8} {line}")
    return [*lines, f"next: {summary['next']}"]


def _stage(stage: Mapping[str, Any]) -> str:
    from aif.status import COUNTS

    keys = (*COUNTS, "null", "answers", "faults", "damaged_lines")
    facts = tokens({key: stage[key] for key in keys if stage.get(key)} | stage["tokens"])
    parts = [counts(facts)] if facts else []
    parts += [f"{dollars(stage['cost'])} spent"] if stage["cost"] else []
    return ", ".join([*parts, *stage["outcome"]])
