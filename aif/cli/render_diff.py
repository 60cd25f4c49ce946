"""What a person is told of a diff: a table that fits 60 columns, and flips side by side."""

from __future__ import annotations

import io
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from aif.data.visible import visible

NAME = 18  # columns for a principle's name; a longer one has a line of its own
HEAD = f"{'':{NAME}} {'agree':>5} {'95 %':9} {'kappa':>5} {'flips':>9} {'n':>9}"
WIDEST = 100  # columns of the flips; lines that are longer are hard to read
MOVED = 3  # principles that are shown of a flip
TEXT = 600  # characters that are shown of a text


def diff(summary: dict[str, Any]) -> list[str]:
    """What differs, how far the labels agree, and the largest flips."""
    rows = {"all": summary["all"]} | summary["by_principle"]
    return [
        f"A  {summary['a']}",
        f"B  {summary['b']}",
        *(part for line in _differences(summary) for part in _wrapped(line)),
        *_counts(summary),
        HEAD,
        *(line for name, figures in rows.items() for line in _row(name, figures)),
        *_nulls(summary["nulls"]),
        *(
            line
            for number, flip in enumerate(summary["largest"], 1)
            for line in _flip(number, flip)
        ),
        summary["file"],
    ]


def _differences(summary: Mapping[str, Any]) -> list[str]:
    found = summary["differences"]
    if found is None:
        found = ["what the two were made with is not known"]
    return [*summary["notes"], *(found or ["no setting, question or rule differs"])]


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(
        visible(line), 60, initial_indent="  ", subsequent_indent="    ", break_long_words=False
    )


def _counts(summary: Mapping[str, Any]) -> list[str]:
    found, labels = summary["comparisons"], summary["labels"]
    only = [f"{found[f'only_{k}']:,} only in {k.upper()}" for k in "ab" if found[f"only_{k}"]]
    only += [f"{found['turned']:,} the other way round"] if found["turned"] else []
    lines = [", ".join([f"{found['both']:,} comparisons in both", *only])]
    if labels["both"] < found["both"]:
        lines.append(f"{labels['both']:,} labelled in both (A {labels['a']:,}, B {labels['b']:,})")
    if summary["all"]["n"]:
        lines.append(f"p moved by {summary['all']['moved']:.3f} on average")
    return lines


def _row(name: str, figures: Mapping[str, Any]) -> list[str]:
    interval = "{:.2f}-{:.2f}".format(*figures["interval"]) if figures["n"] else ""
    told = (
        f"{_figure(figures['agreement']):>5} {interval:9} {_figure(figures['kappa']):>5} "
        f"{figures['flips']:>9,} {figures['n']:>9,}"
    )
    return [name, f"{'':{NAME}} {told}"] if len(name) > NAME else [f"{name:{NAME}} {told}"]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:z.2f}"  # z: no -0.00


def _nulls(nulls: Mapping[str, Any]) -> list[str]:
    told = {"in B alone": nulls["gained"], "in A alone": nulls["lost"]}
    parts = [
        f"{where} {', '.join(f'{n:,} {fault}' for fault, n in found.items())}"
        for where, found in told.items()
        if found
    ]
    parts += [f"in both {nulls['both']:,}"] if nulls["both"] else []
    return [f"null: {'; '.join(parts)}"] if parts else []


def _flip(number: int, row: Mapping[str, Any]) -> Iterator[str]:
    """One flip: how far it moved and under which principles, the texts, what the judges said."""
    a, b = row["a"], row["b"]
    moved = _moved(a["by_principle"], b["by_principle"])
    yield ""
    yield f"{number}. A: {a['p_first']:.2f} -> B: {b['p_first']:.2f}"
    for name, p_a, p_b in moved:
        yield f"   {name} {_figure(p_a)} -> {_figure(p_b)}"
    prompt = [f"{message['role']}: {message['content']}" for message in row["prompt"]]
    told = [("prompt", "\n".join(prompt))]
    yield from _table([], told)
    yield from _table(["first", "second"], [(row["first"], row["second"])])
    yield from _table([], _said(a["verdicts"], b["verdicts"], {name for name, _, _ in moved}))


def _moved(
    a: Mapping[str, float | None], b: Mapping[str, float | None]
) -> list[tuple[str, float | None, float | None]]:
    """The principles whose probability moved most; one that a side has none of counts from even."""
    every = [(name, a.get(name), b.get(name)) for name in dict.fromkeys([*b, *a])]

    def far(found: tuple[str, float | None, float | None]) -> float:
        _, p_a, p_b = found
        return abs((0.5 if p_a is None else p_a) - (0.5 if p_b is None else p_b))

    return sorted(every, key=far, reverse=True)[:MOVED]


def _said(a: list[dict], b: list[dict], principles: set[str]) -> list[tuple[str, str]]:
    """What the judges said under some principles, where it is more than the option they chose; what
    both labellings were told stands there once."""
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
    for number in range(2):
        ratio = 1 if heads or number else None
        head = heads[number] if heads else ""
        table.add_column(head, ratio=ratio, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_shown(text)) for text in row))
    # A console of its own: a terminal's colours have no place in lines that may be piped.
    console = Console(file=io.StringIO(), width=max(width - 3, 20), color_system=None)
    console.print(table)
    return [f"   {line.rstrip()}" for line in console.file.getvalue().splitlines()]


def _shown(text: str) -> str:
    """A text that a stranger wrote, cut and with nothing in it that a terminal would obey."""
    return visible(text if len(text) <= TEXT else f"{text[: TEXT - 3]}...")
