"""What decides a judge's answers, of what a labelling says that it used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Of label.json; the last three stand there for several judges, or where not all is asked.
IDENTITY = ("judge", "protocol", "template", "constitution", "panel", "consensus", "escalation")


def identity(used: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a judge's answers, of what a labelling says that it used (label.json)."""
    found = {key: used[key] for key in IDENTITY if key in used}
    if isinstance(found.get("constitution"), dict):
        found["constitution"] = found["constitution"].get("digest")
    return found
