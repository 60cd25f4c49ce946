"""What a labelling used, and what differs from the one before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aif.judge.judge import Judge
from aif.judge.panel import Panel
from aif.store.records import content_id


def facts(panel: Panel, constitution: Path, data: dict[str, Any]) -> dict[str, Any]:
    """What a labelling used, so that the next one can say what changed."""
    judge = panel.first
    sampled = judge.constitution.principles == "sample"
    others = {seat.name: _asked(seat.judge) for seat in panel.seats[1:]}
    return {
        "data": data,
        "draw": f"one principle, seed {judge.seed}" if sampled else "all principles",
        "judge": judge.model.identity(),
        "protocol": judge.protocol,
        "template": content_id(judge.template.text),
        **({"panel": others} if others else {}),
        **panel.rules(),
        "constitution": {
            "file": str(constitution),
            "name": judge.constitution.name,
            "digest": judge.constitution.digest(),
            "preamble": content_id(judge.constitution.preamble),
            "principles": _digests(judge),
        },
    }


def _asked(judge: Judge) -> dict[str, Any]:
    """What a further judge's calls depend on."""
    how = {"protocol": judge.protocol, "template": content_id(judge.template.text)}
    return judge.model.identity() | how | {"principles": _digests(judge)}


def _digests(judge: Judge) -> dict[str, str]:
    return {p.id: p.digest(judge.protocol, judge.form) for p in judge.constitution.principle}


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs from the last labelling in what calls depend on, a line each."""
    if "constitution" not in before:
        return []
    lines = []
    for key in ("judge", "protocol", "template", "draw"):
        if before.get(key) != now[key]:
            lines.append(f"{key} changed{_difference(before.get(key), now[key])}")
    was, is_now = before.get("panel", {}), now.get("panel", {})
    lines += [f"judge {name!r} left" for name in was if name not in is_now]
    lines += [f"judge {name!r} joined" for name in is_now if name not in was]
    both = [(was[name], is_now[name]) for name in is_now if name in was]
    for old, new in both:
        if old | {"principles": ()} != new | {"principles": ()}:
            lines.append(f"judge {new['model']!r} changed")
    rules = ("consensus", "escalation") if is_now and was else ("escalation",)
    for key in rules:
        if before.get(key) != now.get(key):
            lines.append(f"{key} changed{_difference(before.get(key), now.get(key) or 'none')}")
    if now["data"] and before["data"].get("digest") != now["data"].get("digest"):
        lines.append("the data changed")
    old, new = before["constitution"], now["constitution"]
    if old["preamble"] != new["preamble"]:
        lines.append("the constitution's preamble changed")
    asked = [(before, now, old["principles"], new["principles"])]
    asked += [(was, is_now, was["principles"], is_now["principles"]) for was, is_now in both]
    lines += dict.fromkeys(line for each in asked for line in _edits(*each))
    if not lines and old["digest"] != new["digest"]:
        moved = "the draws move with them" if now["draw"].startswith("one") else "no call is needed"
        lines.append(f"only weights or rules of the constitution changed: {moved}")
    return lines


def _edits(
    judge: dict[str, Any], judge_now: dict[str, Any], old: dict[str, str], new: dict[str, str]
) -> Iterator[str]:
    """Which of the questions that one judge was asked are others now."""
    same = judge.get("protocol") == judge_now["protocol"]  # else each puts another question
    for name in old | new:
        was, is_now = old.get(name), new.get(name)
        if was != is_now and (same or None in (was, is_now)):
            what = "is new" if was is None else "is gone" if is_now is None else "was edited"
            yield f"principle {name!r} {what}"


def _difference(before: Any, now: Any) -> str:
    """What changed in a setting, or in a table of them."""
    if not isinstance(now, dict):
        return f": {before} -> {now}" if len(str(now)) < 64 else ""  # a digest tells nothing
    moved = [key for key in now if now[key] != (before or {}).get(key)]
    return ": " + ", ".join(f"{key} {(before or {}).get(key)} -> {now[key]}" for key in moved)
