"""What a labelling used, and what changed since the last one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aif.config.settings import Settings
from aif.judge.judge import Judge
from aif.judge.panel import Panel, constitution_path
from aif.store.records import content_id


def facts(panel: Panel, settings: Settings, data: dict[str, Any]) -> dict[str, Any]:
    """What a labelling used, so that the next one can say what changed."""
    first, *others = panel.judges
    sampled = first.constitution.principles == "sample"
    return {
        "data": data,
        "draw": f"one principle, seed {first.seed}" if sampled else "all principles",
        "judge": first.model.identity(),
        "protocol": first.protocol,
        "template": content_id(first.template.text),
        **({"panel": {judge.name: _other(judge) for judge in others}} if others else {}),
        **panel.rules(),
        "constitution": {
            "file": str(constitution_path(settings)),
            "name": first.constitution.name,
            "digest": first.constitution.digest(),
            "preamble": content_id(first.constitution.preamble),
            "principles": _digests(first),
        },
    }


def _other(judge: Judge) -> dict[str, Any]:
    """What the calls of a judge besides the first depend on."""
    protocol = {"protocol": judge.protocol, "template": content_id(judge.template.text)}
    return judge.model.identity() | protocol | {"principles": _digests(judge)}


def _digests(judge: Judge) -> dict[str, str]:
    return {p.id: p.digest(judge.protocol, judge.form) for p in judge.constitution.principle}


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What calls depend on that differs from the last labelling, a line each."""
    if "constitution" not in before:
        return []
    lines = []
    for key in ("judge", "protocol", "template", "draw"):
        if before.get(key) != now[key]:
            lines.append(f"{key} changed{_difference(before.get(key), now[key])}")
    others, others_now = before.get("panel", {}), now.get("panel", {})
    lines += [f"judge {name!r} left" for name in others if name not in others_now]
    lines += [f"judge {name!r} joined" for name in others_now if name not in others]
    both = [(others[name], others_now[name]) for name in others_now if name in others]
    for old, new in both:
        if old | {"principles": ()} != new | {"principles": ()}:
            lines.append(f"judge {new['model']!r} changed")
    for key in ("consensus", "escalation") if others_now and others else ("escalation",):
        if before.get(key) != now.get(key):
            lines.append(f"{key} changed{_difference(before.get(key), now.get(key) or 'none')}")
    if now["data"] and before["data"].get("digest") != now["data"].get("digest"):
        lines.append("the data changed")
    old, new = before["constitution"], now["constitution"]
    if old["preamble"] != new["preamble"]:
        lines.append("the constitution's preamble changed")
    judges = [(before, now, old["principles"], new["principles"])]
    judges += [(was, is_now, was["principles"], is_now["principles"]) for was, is_now in both]
    lines += dict.fromkeys(line for judge in judges for line in _edits(*judge))
    if not lines and old["digest"] != new["digest"]:
        moved = "the draws move with them" if now["draw"].startswith("one") else "no call is needed"
        lines.append(f"only weights or rules of the constitution changed: {moved}")
    return lines


def _edits(
    judge: dict[str, Any], judge_now: dict[str, Any], old: dict[str, str], new: dict[str, str]
) -> Iterator[str]:
    """A line for each principle whose question to a judge is new, gone or edited."""
    # Another protocol has another question for every principle: that is one change, not many.
    same_protocol = judge.get("protocol") == judge_now["protocol"]
    for name in old | new:
        was, is_now = old.get(name), new.get(name)
        if was != is_now and (same_protocol or None in (was, is_now)):
            what = "is new" if was is None else "is gone" if is_now is None else "was edited"
            yield f"principle {name!r} {what}"


def _difference(before: Any, now: Any) -> str:
    """What changed in a setting, or in a table of settings."""
    if not isinstance(now, dict):
        return f": {before} -> {now}" if len(str(now)) < 64 else ""  # a digest says nothing
    changed = [key for key in now if now[key] != (before or {}).get(key)]
    return ": " + ", ".join(f"{key} {(before or {}).get(key)} -> {now[key]}" for key in changed)
