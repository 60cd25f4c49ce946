"""`aif diff`: which labels flipped between two labellings, in a table that fits 60 columns."""

from __future__ import annotations

import io
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from aif.cli.options import (
    BASE_URL,
    CONSTITUTION,
    PROTOCOL,
    Console,
    Judges,
    existing_run,
    judge_settings,
    verb,
)
from aif.cli.render import counts, number, table_row
from aif.data.visible import visible

diff_app = typer.Typer()

NAME = 18  # columns for a principle's name
HEAD = f"{'':{NAME}} {'agree':>5} {'95 %':9} {'kappa':>5} {'flips':>9} {'n':>9}"
WIDEST = 100  # columns of the flips; longer lines are hard to read
MOST_MOVED = 3  # principles that are shown of a flip
TEXT = 600  # characters that are shown of a text


@verb(diff_app, CONSTITUTION, BASE_URL, PROTOCOL, quiet=False)
def diff(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run folder.")],
    run_b: Annotated[
        Path | None, typer.Argument(metavar="[RUN_B]", help="Another run folder.")
    ] = None,
    *,
    judge: Judges = None,
    show: Annotated[int, typer.Option(min=0, help="How many flips to print.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="The file for the flips; default: diff.jsonl in RUN_B.")
    ] = None,
    settings: dict[str, Any],
    console: Console,
) -> None:
    """Say which labels flipped between two labellings, and why. It makes no call.

    Without RUN_B, the labels of RUN_A are compared with the labels that its stored answers give
    under its current settings, its current constitution and the options of this command.
    """
    from aif.auditing.diff import diff as compared
    from aif.errors import InputError

    if run_b and (judge or settings):
        raise InputError(
            "diff", "RUN_B", got=str(run_b), expected="none, with another constitution or judge"
        )
    run = existing_run(run_a, judge_settings(judge, None, run_a) | settings)
    console.show(compared(run, existing_run(run_b) if run_b else None, out, show), diff_lines)


def diff_lines(summary: dict[str, Any]) -> list[str]:
    """What differs, how far the labels agree, and the largest flips."""
    rows = {"all": summary["all"]} | summary["by_principle"]
    return [
        f"A  {summary['a']}",
        f"B  {summary['b']}",
        *(part for line in _differences(summary) for part in _wrapped(line)),
        *_counts(summary),
        HEAD,
        *(line for name, row in rows.items() for line in _row(name, row)),
        *_nulls(summary["nulls"]),
        *(line for place, flip in enumerate(summary["largest"], 1) for line in _flip(place, flip)),
        summary["file"],
    ]


def _differences(summary: Mapping[str, Any]) -> list[str]:
    differences = summary["differences"]
    if differences is None:
        differences = ["it is not known how the two were made"]
    return [*summary["notes"], *(differences or ["no setting, question or rule differs"])]


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(
        visible(line), 60, initial_indent="  ", subsequent_indent="    ", break_long_words=False
    )


def _counts(summary: Mapping[str, Any]) -> list[str]:
    comparisons, labels = summary["comparisons"], summary["labels"]
    names = {"both": "comparisons in both", "only_a": "only in A", "only_b": "only in B"}
    names |= {"turned": "the other way round"}
    kept = {name: n for key, name in names.items() if (n := comparisons[key]) or key == "both"}
    lines = [counts(kept)]
    if labels["both"] < comparisons["both"]:
        lines.append(f"{labels['both']:,} labelled in both (A {labels['a']:,}, B {labels['b']:,})")
    if summary["all"]["n"]:
        lines.append(f"p moved by {summary['all']['moved']:.3f} on average")
    return lines


def _row(name: str, row: Mapping[str, Any]) -> list[str]:
    interval = "{:.2f}-{:.2f}".format(*row["interval"]) if row["n"] else ""
    cells = (
        f"{number(row['agreement']):>5} {interval:9} {number(row['kappa']):>5} "
        f"{row['flips']:>9,} {row['n']:>9,}"
    )
    return table_row(name, cells, NAME)


def _nulls(nulls: Mapping[str, Any]) -> list[str]:
    sides = {"in B alone": nulls["gained"], "in A alone": nulls["lost"]}
    parts = [f"{where} {counts(faults)}" for where, faults in sides.items() if faults]
    parts += [f"in both {nulls['both']:,}"] if nulls["both"] else []
    return [f"null: {'; '.join(parts)}"] if parts else []


def _flip(place: int, row: Mapping[str, Any]) -> Iterator[str]:
    """One flip: how far it moved and under which principles, the texts, the judges' comments."""
    a, b = row["a"], row["b"]
    moved = _moved(a["by_principle"], b["by_principle"])
    yield ""
    yield f"{place}. A: {a['p_first']:.2f} -> B: {b['p_first']:.2f}"
    for name, p_a, p_b in moved:
        yield f"   {name} {number(p_a)} -> {number(p_b)}"
    prompt = [f"{message['role']}: {message['content']}" for message in row["prompt"]]
    yield from _table([], [("prompt", "\n".join(prompt))])
    yield from _table(["first", "second"], [(row["first"], row["second"])])
    yield from _table([], _comments(a["verdicts"], b["verdicts"], {name for name, _, _ in moved}))


def _moved(
    a: Mapping[str, float | None], b: Mapping[str, float | None]
) -> list[tuple[str, float | None, float | None]]:
    """The principles whose probability moved most. A probability that is missing counts as 0.5."""
    every = [(name, a.get(name), b.get(name)) for name in dict.fromkeys([*b, *a])]

    def distance(principle: tuple[str, float | None, float | None]) -> float:
        _, p_a, p_b = principle
        return abs((0.5 if p_a is None else p_a) - (0.5 if p_b is None else p_b))

    return sorted(every, key=distance, reverse=True)[:MOST_MOVED]


def _comments(a: list[dict], b: list[dict], principles: set[str]) -> list[tuple[str, str]]:
    """What the judges wrote under some principles, if it is more than the option they chose. A text
    that is in both labellings stands there once."""
    sides: dict[tuple[str, str, str], str] = {}
    for side, verdicts in (("A", a), ("B", b)):
        for v in verdicts:
            if v["principle_id"] in principles and v["text"] and len(v["text"].split()) > 1:
                key = v["principle_id"], v["order"], v["text"]
                sides[key] = sides.get(key, "") + side
    return [(f"{side} {name} {order}", text) for (name, order, text), side in sides.items()]


def _table(heads: list[str], rows: list[tuple[str, str]]) -> list[str]:
    """Two columns of text, wrapped; with heads they are of one width."""
    if not rows:
        return []
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = min(shutil.get_terminal_size().columns, WIDEST)
    table = Table(box=None, show_header=bool(heads), expand=True, pad_edge=False)
    for column in range(2):
        ratio = 1 if heads or column else None
        table.add_column(heads[column] if heads else "", ratio=ratio, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cut(text)) for text in row))
    # A console of its own: a terminal's colours have no place in lines that may be piped.
    console = Console(file=io.StringIO(), width=max(width - 3, 20), color_system=None)
    console.print(table)
    return [f"   {line.rstrip()}" for line in console.file.getvalue().splitlines()]


def _cut(text: str) -> str:
    """A stranger's text, cut, without characters that a terminal obeys."""
    return visible(text if len(text) <= TEXT else f"{text[: TEXT - 3]}...")
