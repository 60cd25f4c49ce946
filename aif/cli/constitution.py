"""`aif constitution ...`: check, show and compare constitution files."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aif.cli.options import Console, File, verb

if TYPE_CHECKING:
    from aif.constitution.file import Constitution

constitution_app = typer.Typer(
    help="Check, show and compare constitution files.", no_args_is_help=True, rich_markup_mode=None
)


@verb(constitution_app, quiet=False)
def check(file: File, console: Console) -> None:
    """Check a constitution: an error ends with exit code 1, a note does not."""
    from aif.constitution.file import load

    constitution = load(file)
    notes, principles = constitution.lint(), len(constitution.principle)
    console.show(
        {"file": str(file), "principles": principles, "notes": notes},
        lambda _: [*(f"note: {note}" for note in notes), f"{file}: {principles} principles, ok"],
    )


@verb(constitution_app, quiet=False)
def show(file: File, console: Console) -> None:
    """Print a constitution with its defaults filled in."""
    from aif.constitution.file import load

    constitution = load(file)
    summary = constitution.model_dump() | {"digest": constitution.digest()}
    console.show(summary, lambda _: _constitution_lines(constitution))


def _constitution_lines(constitution: Constitution) -> list[str]:
    lines = [f"{constitution.name}: {constitution.description or 'no description'}"]
    lines.append(f"{constitution.principles} principles, combined by {constitution.combine}")
    lines.append(f"digest {constitution.digest()}")
    for principle in constitution.principle:
        lines.append(f"\n{principle.id}  weight {principle.weight:g}")
        for key in ("critique", "revision", "compare", "grade"):
            if text := getattr(principle, key):
                lines.append(f"  {key:9} {text}")
        if principle.example:
            yes = sum(example.verdict for example in principle.example)
            lines.append(f"  examples  {yes} yes, {len(principle.example) - yes} no")
    return lines


@verb(constitution_app, quiet=False)
def diff(
    file: File,
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="The edited file.")],
    console: Console,
) -> None:
    """Say what differs between two constitutions, and which calls the edit costs."""
    from aif.constitution.diff import constitution_diff
    from aif.constitution.file import load

    summary = {"a": str(file), "b": str(other)} | constitution_diff(load(file), load(other))
    console.show(summary, _diff_lines)


def _diff_lines(summary: dict[str, Any]) -> list[str]:
    lines = [f"{summary['a']} -> {summary['b']}"]
    lines += [_changed(key, pair) for key, pair in summary["changed"].items()]
    for principle in summary["principles"]:
        lines.append(f"principle {principle['id']!r} {_IS[principle['is']]}")
        lines += [f"  {_changed(key, pair)}" for key, pair in principle["changed"].items()]
    lines += ["the order of the principles changed"] if summary["reordered"] else []
    lines += ["nothing differs"] if len(lines) == 1 else []
    lines.append("asks again")
    for way, again in summary["asks_again"].items():
        lines += [f"  {way}: {part}" for part in _asks_again(again)]
    revise = summary["revise"]
    edited = ", ".join(revise["edited"])
    chains = [f"each chain from its first {edited} on"] if edited else []
    chains += ["chains whose draws move"] if revise["draws_move"] else []
    return [*lines, f"  aif revise: {'; '.join(chains) or 'no call'}"]


_IS = {"new": "is new", "gone": "is gone", "edited": "was edited"}


def _asks_again(again: dict[str, str] | None) -> list[str]:
    """The principles that are asked again, a line for each set of comparisons."""
    if again is None:
        return ["cannot be asked, as a principle lacks its question"]
    by_which: dict[str, list[str]] = {}
    for name, which in again.items():
        by_which.setdefault(which, []).append(name)
    return [f"{', '.join(names)} ({which})" for which, names in by_which.items()] or ["no call"]


def _changed(key: str, pair: list[Any]) -> str:
    """A key with its old and new value, from shortly before the first difference."""
    from aif.errors import shown

    old, new = pair
    if isinstance(old, list):
        gone, added = (sum(one not in other for one in some) for some, other in (pair, pair[::-1]))
        return f"{key}: {gone} gone, {added} new, {len(new)} in all"
    if isinstance(old, str) and isinstance(new, str):
        alike = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(*pair, strict=False)))
        old, new = (text if alike <= 12 else f"...{text[alike - 12 :]}" for text in pair)
    return f"{key}: {shown(old, 40)} -> {shown(new, 40)}"
