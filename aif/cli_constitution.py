"""`aif constitution ...`: looking at a constitution file."""

from __future__ import annotations

import typer

from aif.console import File, Json, show_summary, verb

constitution_app = typer.Typer(
    help="Look at a constitution file.", no_args_is_help=True, rich_markup_mode=None
)


@verb(constitution_app)
def check(file: File, json_: Json = False) -> None:
    """Check a constitution: an error ends with exit code 1, a note does not."""
    from aif.constitution import load

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
    from aif.constitution import load
    from aif.status import constitution_lines

    found = load(file)
    summary = found.model_dump() | {"digest": found.digest()}
    show_summary(summary, json_, False, lambda _: constitution_lines(found))
