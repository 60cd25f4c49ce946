"""What every verb of the command line has: its options, how it fails, how it reports."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from aif.run import Run

EPILOG = (
    "Exit codes: 0 done; 1 error; 2 wrong usage; 3 done, but more calls failed than "
    "--max-fault-rate; 4 the budget is spent, a larger --budget resumes; 5 the run would take "
    "longer than --within; 130 interrupted, the same command resumes."
)

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as runs/first.")]
File = Annotated[Path, typer.Argument(metavar="FILE", help="A constitution, in TOML.")]
Out = Annotated[Path, typer.Option("--out", help="Run folder; one that exists is resumed.")]
Pairs = Annotated[
    str | None, typer.Option(help="JSONL of pairs, or hf:NAME[:SPLIT]; see the README for shapes.")
]
ConstitutionFile = Annotated[str | None, typer.Option("--constitution", help="TOML file.")]
JUDGES = (
    "openai:MODEL, openai-batch:MODEL (the Batch API), vllm:MODEL, smollm2-135m (bundled), "
    "a folder or hub id, scripted:FILE."
)
Judge = Annotated[str | None, typer.Option(help=JUDGES)]
Judges = Annotated[list[str] | None, typer.Option("--judge", help=f"{JUDGES} Repeatable: a panel.")]
Consensus = Annotated[
    str | None, typer.Option(help="Of several judges: mean, majority or unanimous.")
]
BaseUrl = Annotated[str | None, typer.Option(help="Server of an openai: judge, ending in /v1.")]
Protocol = Annotated[
    str | None, typer.Option(help="pairwise, reasoned, pointwise or rating; default: by judge.")
]
Prices = Annotated[
    list[str] | None,
    typer.Option(
        "--price",
        metavar="IN/OUT",
        help="Dollars a million prompt tokens / completion tokens, as 0.15/0.60, once for each "
        "--judge; of openai-batch: the price of its batches, which is often half.",
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        metavar="DOLLARS",
        help="All that calls may cost, now and before; what fits is done, then it exits with 4.",
    ),
]
Concurrency = Annotated[int | None, typer.Option(help="Calls in flight at most.")]
Limit = Annotated[int | None, typer.Option(help="Take the first N rows only.")]
Seed = Annotated[int | None, typer.Option(help="Seed of every draw.")]
FaultRate = Annotated[
    float | None, typer.Option(help="Share of calls without an answer from which to exit with 3.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Any setting of run.toml; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")]


def verb(group: typer.Typer, name: str | None = None) -> Callable[[Callable], Callable]:
    """Register a command whose errors become one line and an exit code."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def guarded(*args: Any, debug: bool, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except KeyboardInterrupt:
                raise typer.Exit(130) from None
            except Exception as error:
                raise typer.Exit(_report(error, debug)) from None

        signature = inspect.signature(function, eval_str=True)
        last = inspect.Parameter(
            "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug
        )
        guarded.__signature__ = signature.replace(parameters=[*signature.parameters.values(), last])
        guarded.__annotations__ = {n: p.annotation for n, p in signature.parameters.items()}
        guarded.__annotations__["debug"] = Debug
        return group.command(name, epilog=EPILOG)(guarded)

    return register


def _report(error: Exception, debug: bool) -> int:
    """Print an error as one line; returns the exit code."""
    from aif.errors import AifError

    if debug:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):
        return 1
    line = str(error) if isinstance(error, AifError) else f"{type(error).__name__}: {error}"
    hint = "" if isinstance(error, AifError) else " (a fault of aif; --debug shows where)"
    # A key or a text from a file may hold terminal escapes; they are shown, not obeyed.
    plain = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(line.split()))
    print(f"aif: {plain}{hint}", file=sys.stderr)
    return error.exit_code if isinstance(error, AifError) else 1


def judges_given(judges: list[str] | None, prices: list[str] | None, run: Path) -> dict[str, Any]:
    """`[judge]` and `[[panel]]` as the `--judge`s name them, with the `--price`s in their order;
    one that run.toml has is asked as it says there."""
    from aif.config.settings import load_settings
    from aif.errors import InputError

    judges, prices = judges or [], prices or []
    if len(prices) > max(1, len(judges)):
        got = f"{len(prices)} for {len(judges)} of --judge"
        raise InputError("--price", "", got=got, expected="one for each")
    told = {"judge.price": prices[0]} if prices else {}
    if not judges:
        return told
    kept = load_settings(run / "run.toml", {})
    known = {
        one.model: one.model_dump(exclude_defaults=True) | {"model": one.model}
        for one in (*kept.panel, kept.judge)
    }
    first, *others = judges
    panel = [known.get(name, {"model": name}) for name in others]
    panel = [
        judge | ({"price": price} if price else {})
        for judge, price in zip_longest(panel, prices[1:])
    ]
    judge = {"judge": known[first]} if first in known else {"judge.model": first}
    return {"panel": panel} | judge | told


def open_run(path: Path, given: dict[str, Any], sets: list[str] | None) -> Run:
    """The run at `path` with run.toml and the command line's settings."""
    from aif.config.settings import load_settings
    from aif.config.toml import parse_set
    from aif.run import Run

    settings = load_settings(path / "run.toml", given | dict(map(parse_set, sets or [])))
    return Run(path, settings)


def existing_run(
    path: Path, sets: list[str] | None = None, given: dict[str, Any] | None = None
) -> Run:
    """The run at `path`, for verbs that make none."""
    from aif.errors import InputError

    if not path.is_dir():
        raise InputError(path, "", got="no such folder", expected="a run folder")
    return open_run(path, given or {}, sets)


def training_run(
    path: Path, sets: list[str] | None, given: dict[str, Any], data: list[str] | None
) -> Run:
    """The run at `path`; with data of its own to learn from it need not be there yet."""
    from aif.run import Follower

    run = open_run(path, given, sets) if data else existing_run(path, sets, given)
    return run if _leads() else Follower(run.path, run.settings)


def _leads() -> bool:
    """Whether this is the first of the processes that a launcher of torch's started, or no such."""
    return os.environ.get("RANK", "0") == "0"


def show_summary(
    summary: dict[str, Any],
    as_json: bool,
    quiet: bool,
    lines: Callable[[dict[str, Any]], list[str]],
) -> None:
    """Print what a verb came to: one JSON object, or lines for a person."""
    if as_json:
        print(json.dumps(summary))
    elif not quiet:
        print("\n".join(lines(summary)))


def parse_source(argument: str) -> tuple[str, float]:
    """`SOURCE=WEIGHT` as both; without a number behind the last `=` the weight is 1."""
    source, equals, weight = argument.rpartition("=")
    try:
        return (source, float(weight)) if equals else (argument, 1.0)
    except ValueError:
        return argument, 1.0


def run_stage(
    name: str,
    run: Run,
    as_json: bool,
    quiet: bool,
    lines: Callable[[dict[str, Any]], list[str]],
) -> dict[str, Any]:
    """Put a run through one stage, show its summary and return it."""
    from aif.errors import InputError, Interrupted
    from aif.pipeline import stage
    from aif.progress import Progress

    try:
        with Progress(quiet or not run.leads) as progress:
            summary = stage(name).function()(run, progress)
    except (InputError, Interrupted) as error:
        if run.leads:
            raise
        sys.exit(error.exit_code)  # of several processes the first one says it
    if run.leads:
        show_summary(summary, as_json, quiet, lines)
    return summary
