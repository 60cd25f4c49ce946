"""The part of label.json that decides a judge's answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The last three are there for several judges, or if not every call is made.
IDENTITY = ("judge", "protocol", "template", "constitution", "panel", "consensus", "escalation")


def identity(used: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of label.json that decide a judge's answers; a constitution by its digest."""
    row = {key: used[key] for key in IDENTITY if key in used}
    if isinstance(row.get("constitution"), dict):
        row["constitution"] = row["constitution"].get("digest")
    return row
