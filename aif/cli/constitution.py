"""`aif constitution ...`: looking at a constitution file."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer

from aif.cli.options import File, Json, show_summary, verb

constitution_app = typer.Typer(
    help="Look at a constitution file.", no_args_is_help=True, rich_markup_mode=None
)


@verb(constitution_app)
def check(file: File, json_: Json = False) -> None:
    """Check a constitution: an error ends with exit code 1, a note does not."""
    from aif.constitution.file import load

    found = load(file)
    notes = found.lint()
    show_summary(
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
    from aif.constitution.file import load
    from aif.status import constitution_lines

    found = load(file)
    summary = found.model_dump() | {"digest": found.digest()}
    show_summary(summary, json_, False, lambda _: constitution_lines(found))


@verb(constitution_app)
def diff(
    file: File,
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="The file as it is now.")],
    json_: Json = False,
) -> None:
    """Say what differs between two constitutions, and which calls it costs."""
    from aif.constitution.diff import constitution_diff
    from aif.constitution.file import load

    found = {"a": str(file), "b": str(other)} | constitution_diff(load(file), load(other))
    show_summary(found, json_, False, _told_diff)


def _told_diff(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['a']} -> {found['b']}"]
    lines += [_moved(key, pair) for key, pair in found["changed"].items()]
    for principle in found["principles"]:
        lines.append(f"principle {principle['id']!r} {_IS[principle['is']]}")
        lines += [f"  {_moved(key, pair)}" for key, pair in principle["changed"].items()]
    lines += ["the order of the principles changed"] if found["reordered"] else []
    lines += ["nothing differs"] if len(lines) == 1 else []
    lines.append("asks again")
    for way, again in found["asks_again"].items():
        lines += [f"  {way}: {told}" for told in _asked(again)]
    revise = found["revise"]
    told = [f"each chain from its first {', '.join(revise['edited'])} on"] * bool(revise["edited"])
    told += ["chains whose draws move"] * revise["draws_move"]
    return [*lines, f"  aif revise: {'; '.join(told) or 'no call'}"]


_IS = {"new": "is new", "gone": "is gone", "edited": "was edited"}


def _asked(again: dict[str, str] | None) -> list[str]:
    """The principles that are asked again, a line for each set of comparisons."""
    if again is None:
        return ["cannot be asked, as a principle lacks its question"]
    by_which: dict[str, list[str]] = {}
    for name, which in again.items():
        by_which.setdefault(which, []).append(name)
    return [f"{', '.join(names)} ({which})" for which, names in by_which.items()] or ["no call"]


def _moved(key: str, pair: list[Any]) -> str:
    """A key with its old and new value, from shortly before where they part."""
    from aif.errors import shown

    old, new = pair
    if isinstance(old, list):
        gone, added = (sum(one not in other for one in some) for some, other in (pair, pair[::-1]))
        return f"{key}: {gone} gone, {added} new, {len(new)} in all"
    if isinstance(old, str) and isinstance(new, str):
        alike = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(*pair, strict=False)))
        old, new = (text if alike <= 12 else f"...{text[alike - 12 :]}" for text in pair)
    return f"{key}: {shown(old, 40)} -> {shown(new, 40)}"
