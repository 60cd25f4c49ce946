"""What every verb of the command line shares: options, errors and output.

    @verb(app, PAIRS, limit("label"))
    def label(out: Out, settings: dict[str, Any], console: Console) -> None:
        console.run_stage("label", open_run(out, settings), label_lines)

The parameter `settings` becomes one option for each flag, and --set; `console` becomes --json and
--quiet. Every verb has --debug.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from aif.progress import Progress
    from aif.run import Run

EPILOG = (
    "Exit codes: 0 done; 1 error; 2 wrong usage; 3 done, but more calls failed than "
    "--max-fault-rate; 4 the budget is spent, a larger --budget resumes; 5 the run would take "
    "longer than --within; 130 interrupted, the same command resumes."
)
Lines = Callable[[Any], list[str]]  # a summary -> what a person reads of it


@dataclass(frozen=True, slots=True)
class Flag:
    """An option of the command line that sets a key of run.toml."""

    option: str
    key: str
    kind: Any
    help: str
    metavar: str | None = None
    parse: Callable[[Any], Any] = lambda value: value
    hidden: bool = False

    @property
    def name(self) -> str:
        """The name that typer gives the value under."""
        return self.option.removeprefix("--").replace("-", "_")

    def parameter(self) -> inspect.Parameter:
        """The option as typer reads it from a signature."""
        option = typer.Option(self.option, help=self.help, metavar=self.metavar, hidden=self.hidden)
        return _keyword(self.name, self.kind | None, option, None)


def _keyword(name: str, kind: Any, option: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


def parse_source(argument: str) -> tuple[str, float]:
    """`SOURCE=WEIGHT` as both; without a number behind the last `=` the weight is 1."""
    source, equals, weight = argument.rpartition("=")
    try:
        return (source, float(weight)) if equals else (argument, 1.0)
    except ValueError:
        return argument, 1.0


def parse_sources(arguments: list[str]) -> dict[str, float]:
    """Several `SOURCE[=WEIGHT]` as weights by source."""
    return dict(map(parse_source, arguments))


JUDGES = (
    "The judge: openai:MODEL, openai-batch:MODEL (the Batch API), vllm:MODEL, smollm2-135m "
    "(bundled), a folder, a hub id or scripted:FILE."
)
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as runs/first.")]
File = Annotated[Path, typer.Argument(metavar="FILE", help="A constitution file (TOML).")]
Out = Annotated[Path, typer.Option("--out", help="The run folder; an existing run is resumed.")]
Judges = Annotated[
    list[str] | None,
    typer.Option("--judge", metavar="NAME", help=f"{JUDGES} Repeat it for a panel."),
]
PAIRS = Flag(
    "--pairs", "label.pairs", str, "The pairs: JSONL or hf:NAME[:SPLIT]; see prompts/README.md."
)
CONSTITUTION = Flag("--constitution", "label.constitution", str, "The constitution file (TOML).")
JUDGE = Flag("--judge", "judge.model", str, JUDGES, "NAME")
BASE_URL = Flag("--base-url", "judge.base_url", str, "Server of an openai: judge, ending in /v1.")
PROTOCOL = Flag(
    "--protocol", "label.protocol", str,
    "How to ask: pairwise, reasoned, pointwise or rating; the default depends on the judge.",
)  # fmt: skip
CONCURRENCY = Flag("--concurrency", "judge.concurrency", int, "The most calls in flight at once.")


def seed(stage: str) -> Flag:
    """--seed of a stage."""
    return Flag("--seed", f"{stage}.seed", int, "Seed of all random draws.")


def limit(stage: str) -> Flag:
    """--limit of a stage."""
    return Flag("--limit", f"{stage}.limit", int, "Use only the first N rows.", "N")


def max_fault_rate(stage: str) -> Flag:
    """--max-fault-rate of a stage."""
    message = "Exit with 3 if a larger share of the calls has no answer."
    return Flag("--max-fault-rate", f"{stage}.max_fault_rate", float, message)


def budget(stage: str) -> Flag:
    """--budget of a stage."""
    message = "The most that calls may cost, past ones included; at the limit it exits with 4."
    return Flag("--budget", f"{stage}.budget", float, message, "DOLLARS")


SET = _keyword(
    "set_", list[str] | None,
    typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Set any key of run.toml; repeatable."),
    None,
)  # fmt: skip
JSON = _keyword("json_", bool, typer.Option("--json", help="Print one JSON object."), False)
QUIET = _keyword("quiet", bool, typer.Option("--quiet", help="Print only errors."), False)
DEBUG = _keyword("debug", bool, typer.Option("--debug", help="Show an error's traceback."), False)


@dataclass(frozen=True, slots=True)
class Console:
    """How a verb reports: progress on stderr; on stdout lines for a person, or a JSON object."""

    as_json: bool
    quiet: bool

    def progress(self) -> Progress:
        """The progress that a stage reports to."""
        from aif.progress import Progress

        return Progress(self.quiet)

    def show(self, summary: Mapping[str, Any], lines: Lines) -> None:
        """Print a summary."""
        if self.as_json:
            print(json.dumps(summary))
        elif not self.quiet:
            print("\n".join(lines(summary)))

    def run_stage(self, name: str, run: Run, lines: Lines) -> None:
        """Do one stage and print its summary. Raises TooManyFaults after that."""
        from aif.llm.dispatch import check_faults
        from aif.pipeline import allowed_fault_rate, stage

        with self.progress() as progress:
            summary = stage(name).function()(run, progress)
        self.show(summary, lines)
        if "fault_rate" in summary:
            check_faults(summary, allowed_fault_rate(run, name))

    def run_distributed(self, name: str, run: Run, lines: Lines) -> None:
        """Do a stage that a launcher may have started in several processes: the first process
        (RANK 0) alone writes and prints."""
        from aif.errors import InputError, Interrupted
        from aif.pipeline import stage
        from aif.progress import Progress
        from aif.run import Follower

        if os.environ.get("RANK", "0") == "0":
            self.run_stage(name, run, lines)
            return
        try:
            stage(name).function()(Follower(run.path, run.settings), Progress(quiet=True))
        except (InputError, Interrupted) as error:
            sys.exit(error.exit_code)  # the first process says why


def verb(
    group: typer.Typer, *flags: Flag, name: str | None = None, quiet: bool = True
) -> Callable[[Callable], Callable]:
    """Register a command. Its errors become one line and an exit code.

    `settings` is {"label.pairs": ...} of the flags that are set, then of --set. `quiet=False` is
    for a verb that does nothing but print: it has no --quiet.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        own = inspect.signature(function, eval_str=True).parameters
        for parameter in own.values():
            if parameter.name == "settings":
                parameters += [*(flag.parameter() for flag in flags), SET]
            elif parameter.name == "console":
                parameters += [JSON, QUIET] if quiet else [JSON]
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        parameters.append(DEBUG)

        @functools.wraps(function)
        def command(debug: bool, **values: Any) -> None:
            try:
                if "settings" in own:
                    values = _with_settings(values, flags)
                console = Console(values.pop("json_"), values.pop("quiet", False))
                function(**values, console=console)
            except KeyboardInterrupt:
                raise typer.Exit(130) from None
            except Exception as error:
                raise typer.Exit(_report(error, debug)) from None

        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        return group.command(name, epilog=EPILOG)(command)

    return register


def _with_settings(values: dict[str, Any], flags: tuple[Flag, ...]) -> dict[str, Any]:
    """`values` with `settings` in place of the flags and --set; --set wins."""
    from aif.config.toml import parse_set

    sets = dict(map(parse_set, values.pop("set_") or []))
    values_of = {flag: values.pop(flag.name) for flag in flags}
    settings = {flag.key: flag.parse(value) for flag, value in values_of.items()
                if value is not None and value is not False and value != []}  # fmt: skip
    return values | {"settings": settings | sets}


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


def judge_settings(judges: list[str] | None, prices: list[str] | None, run: Path) -> dict[str, Any]:
    """`[judge]` and `[[panel]]` as the --judge options name them, with the --price options in the
    same order. A judge that run.toml has keeps its settings from there."""
    from aif.config.settings import load_settings
    from aif.errors import InputError

    judges, prices = judges or [], prices or []
    if len(prices) > max(1, len(judges)):
        got = f"{len(prices)} for {len(judges)} of --judge"
        raise InputError("--price", "", got=got, expected="one for each")
    price = {"judge.price": prices[0]} if prices else {}
    if not judges:
        return price
    kept = load_settings(run / "run.toml", {})
    tables = {
        one.model: one.model_dump(exclude_defaults=True) | {"model": one.model}
        for one in (*kept.panel, kept.judge)
    }
    first, *others = judges
    panel = [
        tables.get(name, {"model": name}) | ({"price": its_price} if its_price else {})
        for name, its_price in zip_longest(others, prices[1:])
    ]
    judge = {"judge": tables[first]} if first in tables else {"judge.model": first}
    return {"panel": panel} | judge | price


def open_run(path: Path, settings: dict[str, Any]) -> Run:
    """The run at `path` with run.toml and the command line's settings."""
    from aif.config.settings import load_settings
    from aif.run import Run

    return Run(path, load_settings(path / "run.toml", settings))


def existing_run(
    path: Path, settings: dict[str, Any] | None = None, unless: str | None = None
) -> Run:
    """The run at `path`. Raises InputError if there is none, except if `settings` has the key
    `unless`: data from elsewhere, with which a new run may begin."""
    from aif.errors import InputError

    if not path.is_dir() and unless not in (settings or {}):
        raise InputError(path, "", got="no such folder", expected="a run folder")
    return open_run(path, settings or {})
