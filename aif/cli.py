"""The verbs. Each imports its stage when it runs, so that `aif --help` stays quick."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from aif.run import Run

EPILOG = (
    "Exit codes: 0 done; 1 error; 2 wrong usage; 3 done, but more calls failed than "
    "--max-fault-rate; 130 interrupted, the same command resumes."
)

app = typer.Typer(
    help="Label preferences with an LLM judge under a constitution you edit.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
constitution_app = typer.Typer(
    help="Look at a constitution file.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(constitution_app, name="constitution")

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as runs/first.")]
File = Annotated[Path, typer.Argument(metavar="FILE", help="A constitution, in TOML.")]
Out = Annotated[Path, typer.Option("--out", help="Run folder; one that exists is resumed.")]
Pairs = Annotated[
    str | None, typer.Option(help="JSONL of pairs, or hf:NAME[:SPLIT]; see the README for shapes.")
]
ConstitutionFile = Annotated[str | None, typer.Option("--constitution", help="TOML file.")]
Judge = Annotated[
    str | None,
    typer.Option(
        help="openai:MODEL, smollm2-135m (bundled), a folder or hub id, scripted:FILE.",
    ),
]
BaseUrl = Annotated[str | None, typer.Option(help="Server of an openai: judge, ending in /v1.")]
Protocol = Annotated[str | None, typer.Option(help="pairwise or pointwise; default: by judge.")]
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


def open_run(path: Path, given: dict[str, Any], sets: list[str] | None) -> Run:
    """The run at `path` with run.toml and the command line's settings."""
    from aif.config import parse_set
    from aif.run import Run
    from aif.settings import load_settings

    settings = load_settings(path / "run.toml", given | dict(map(parse_set, sets or [])))
    return Run(path, settings)


def existing_run(path: Path, sets: list[str] | None = None) -> Run:
    """The run at `path`, for verbs that make none."""
    from aif.errors import InputError

    if not path.is_dir():
        raise InputError(path, "", got="no such folder", expected="a run folder")
    return open_run(path, {}, sets)


def label_settings(
    pairs: str | None,
    constitution: str | None,
    judge: str | None,
    base_url: str | None,
    protocol: str | None,
    concurrency: int | None,
    limit: int | None,
    seed: int | None,
    max_fault_rate: float | None = None,
) -> dict[str, Any]:
    """The flags of `label` and `plan` under the names they have in run.toml."""
    return {
        "label.pairs": pairs,
        "label.constitution": constitution,
        "judge.model": judge,
        "judge.base_url": base_url,
        "label.protocol": protocol,
        "judge.concurrency": concurrency,
        "label.limit": limit,
        "label.seed": seed,
        "label.max_fault_rate": max_fault_rate,
    }


@verb(app)
def label(
    out: Out,
    pairs: Pairs = None,
    constitution: ConstitutionFile = None,
    judge: Judge = None,
    base_url: BaseUrl = None,
    protocol: Protocol = None,
    concurrency: Concurrency = None,
    limit: Limit = None,
    seed: Seed = None,
    max_fault_rate: FaultRate = None,
    set_: Set = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Label pairs of responses under a constitution.

    Writes verdicts.jsonl (one row a call) and labels.jsonl (one row a pair) to the run folder.
    Run again with an edited constitution, another judge or more data, it asks only what is new.
    """
    from aif.label import check_faults
    from aif.label import label as stage
    from aif.progress import Progress

    given = label_settings(
        pairs, constitution, judge, base_url, protocol, concurrency, limit, seed, max_fault_rate
    )
    run = open_run(out, given, set_)
    with Progress(quiet) as progress:
        summary = stage(run, progress)
    _show(summary, json_, quiet, _label_lines)
    check_faults(run, summary)


def _label_lines(summary: dict[str, Any]) -> list[str]:
    null = sum(summary["labels_null"].values())
    lines = [
        f"{summary['labels']:,} labels ({null:,} null), {summary['calls_made']:,} calls made, "
        f"{summary['calls_kept']:,} kept, {sum(summary['faults'].values()):,} faults"
    ]
    if summary["hard_verdicts"]:
        lines.append(
            f"{summary['hard_verdicts']:,} verdicts are parsed text, not log-probabilities: "
            "their labels are coarse (judge.samples = n makes them finer)"
        )
    if summary["data"].get("repeated_rows"):
        lines.append(
            f"{summary['data']['repeated_rows']:,} rows repeat another and share its label"
        )
    return [*lines, f"{summary['run']}/labels.jsonl"]


@verb(app)
def plan(
    out: Out = Path("runs/plan"),
    pairs: Pairs = None,
    constitution: ConstitutionFile = None,
    judge: Judge = None,
    base_url: BaseUrl = None,
    protocol: Protocol = None,
    concurrency: Concurrency = None,
    limit: Limit = None,
    seed: Seed = None,
    max_fault_rate: FaultRate = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Say what `label` would do with the same arguments: calls, tokens, what an edit costs.

    Asks nothing and writes nothing.
    """
    from aif.label import plan as planned

    given = label_settings(
        pairs, constitution, judge, base_url, protocol, concurrency, limit, seed, max_fault_rate
    )
    _show(planned(open_run(out, given, set_)), json_, False, _plan_lines)


def _plan_lines(plan: dict[str, Any]) -> list[str]:
    lines = [
        f"{plan['comparisons']:,} comparisons, {plan['protocol']} by {plan['judge']}",
        f"{plan['calls']:,} calls to make, {plan['calls_kept']:,} answers kept, "
        f"{plan['answers_unused']:,} no longer used",
        f"{plan['prompt_tokens']:,} prompt tokens ({plan['prompt_tokens_are']}), "
        f"at most {plan['completion_tokens_at_most']:,} to generate",
    ]
    lines += [f"  {name}: {n:,} calls" for name, n in plan["calls_by_principle"].items()]
    return [*plan["changes"], *lines]


@verb(app)
def respond(
    run: RunFolder,
    prompts: Annotated[str | None, typer.Option(help="JSONL with `prompt`, or hf:NAME.")] = None,
    policy: Annotated[str | None, typer.Option(help="The model, named as a judge is.")] = None,
    samples: Annotated[int | None, typer.Option(help="Responses a prompt.")] = None,
    seed: Seed = None,
    limit: Limit = None,
    set_: Set = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Sample responses to prompts: writes responses.jsonl."""
    from aif.progress import Progress
    from aif.respond import respond as stage

    given = {
        "respond.prompts": prompts,
        "policy.model": policy,
        "respond.samples": samples,
        "respond.seed": seed,
        "respond.limit": limit,
    }
    with Progress(quiet) as progress:
        summary = stage(open_run(run, given, set_), progress)
    _show(
        summary,
        json_,
        quiet,
        lambda s: [
            f"{s['responses']:,} responses to {s['prompts']:,} prompts, {s['calls_made']:,} calls",
            f"{s['run']}/responses.jsonl",
        ],
    )


@verb(app)
def compare(run: RunFolder, set_: Set = None, json_: Json = False, quiet: Quiet = False) -> None:
    """Pair up a prompt's responses: writes comparisons.jsonl. Asks nothing."""
    from aif.compare import compare as stage
    from aif.progress import Progress

    with Progress(quiet) as progress:
        summary = stage(existing_run(run, set_), progress)
    _show(summary, json_, quiet, lambda s: [f"{s['run']}/comparisons.jsonl"])


@verb(app, "run")
def run_(run: RunFolder, set_: Set = None, json_: Json = False, quiet: Quiet = False) -> None:
    """Every stage in order, as RUN/run.toml says: respond, compare, label."""
    from aif.label import check_faults
    from aif.pipeline import run_all
    from aif.progress import Progress

    opened = existing_run(run, set_)
    with Progress(quiet) as progress:
        summary = run_all(opened, progress)
    _show(summary, json_, quiet, lambda s: _label_lines(s["label"]))
    check_faults(opened, summary["label"])


@verb(app)
def status(run: RunFolder, json_: Json = False) -> None:
    """Where a run stands: counts, faults, tokens, and what is next."""
    from aif.status import lines
    from aif.status import status as found

    _show(found(existing_run(run)), json_, False, lines)


@verb(app)
def export(
    run: RunFolder,
    format: Annotated[str, typer.Option("--format", help="trl, hh or dataset.")] = "trl",
    to: Annotated[Path | None, typer.Option(help="Where to; default: export/ in the run.")] = None,
    json_: Json = False,
) -> None:
    """Write the labels in a shape that other trainers read."""
    from aif.export import export as write

    def told(summary: dict[str, Any]) -> list[str]:
        left = ", ".join(f"{n:,} {why}" for why, n in summary["left_out"].items())
        return [f"{summary['rows']:,} rows{f'; left out: {left}' if left else ''}", summary["file"]]

    _show(write(existing_run(run), format, to), json_, False, told)


@verb(constitution_app)
def check(file: File, json_: Json = False) -> None:
    """Check a constitution: an error ends with exit code 1, a note does not."""
    from aif.constitution import load

    found = load(file)
    notes = found.lint()
    _show(
        {"file": str(file), "principles": len(found.principle), "notes": notes},
        json_,
        False,
        lambda s: [
            *(f"note: {note}" for note in notes),
            f"{file}: {s['principles']} principles, ok",
        ],
    )


@verb(constitution_app)
def show(file: File, json_: Json = False) -> None:
    """Print a constitution as it is understood, defaults filled in."""
    from aif.constitution import load
    from aif.status import constitution_lines

    found = load(file)
    summary = found.model_dump() | {"digest": found.digest()}
    _show(summary, json_, False, lambda _: constitution_lines(found))


def _show(
    summary: dict[str, Any],
    as_json: bool,
    quiet: bool,
    lines: Callable[[dict[str, Any]], list[str]],
) -> None:
    if as_json:
        print(json.dumps(summary))
    elif not quiet:
        print("\n".join(lines(summary)))


def main() -> None:
    """The `aif` command."""
    app()
