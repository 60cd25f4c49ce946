"""What changed among the settings since version 0.1, so that its files and digests stay valid.

A setting in RENAMED is also read under its old name, with a warning. Digests use the old names, and
leave out a setting or a key of a constitution that is in ADDED and has its default. So a stage of
an older run folder is not done again. tests/config/test_versions.py fails if a changed setting is
in neither list.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any, Literal

from pydantic import BaseModel

from aif.errors import InputError

RENAMED = {  # TABLE.KEY -> what version 0.1 called it
    "respond.few_shot": "respond.shots",
    "respond.sft_samples": "respond.resamples",
}
ADDED: Collection[str] = ()  # TABLE.KEY, or constitution.KEY, that version 0.1 did not have


def use_new_names(tables: dict[str, Any], where: object) -> None:
    """Rename old keys in `tables`, nested as in run.toml or dotted as in `--set`.

    Writes a line of warning to stderr for each. Raises InputError if old and new are both there.
    """
    for new, old in RENAMED.items():
        table, _, old_key = old.partition(".")
        _rename(tables, old, new, where, old, new)
        if isinstance(tables.get(table), dict):
            _rename(tables[table], old_key, new.partition(".")[2], where, old, new)


def _rename(
    table: dict[str, Any], old_key: str, new_key: str, where: object, old: str, new: str
) -> None:
    if old_key not in table:
        return
    if new_key in table:
        raise InputError(where, old, got=f"both it and {new}", expected=f"{new} alone")
    print(f"{where}: {old} is now called {new}; the old name still works", file=sys.stderr)
    table[new_key] = table.pop(old_key)


def for_digest(
    settings: BaseModel, table: str = "", mode: Literal["python", "json"] = "python"
) -> dict[str, Any]:
    """The settings as they enter a digest.

    `table` is their place in run.toml: "" for all of it, "constitution" for a constitution file.
    The two modes of `model_dump` differ in some numbers (120 and 120.0), so a digest keeps to one.
    """
    row = settings.model_dump(mode=mode)
    _as_before(row, settings, table)
    return row


def _as_before(row: dict[str, Any], settings: BaseModel, table: str) -> None:
    """Make a dump of `settings` what version 0.1 would have dumped."""
    for name, field in type(settings).model_fields.items():
        key = f"{table}.{name}".removeprefix(".")
        value = getattr(settings, name)
        if key in ADDED and value == field.get_default(call_default_factory=True):
            del row[name]
            continue
        inner = value if isinstance(value, list) else [value]
        rows = row[name] if isinstance(value, list) else [row[name]]
        for one, its_row in zip(inner, rows, strict=True):
            if isinstance(one, BaseModel):
                _as_before(its_row, one, key)
        if key in RENAMED:
            row[RENAMED[key].rpartition(".")[2]] = row.pop(name)
