"""What an edit of a constitution changes, and which calls it costs; it needs no run.

A call depends on the preamble and on `Principle.digest`, not on ids, weights or rules. So these
decide which calls are made again, for each protocol. If principles are sampled, the draws decide
too. All this is for a labelling that is complete under the first file.
"""

from __future__ import annotations

from typing import Any

from aif.constitution.file import Constitution, Principle

HEAD = tuple(key for key in Constitution.model_fields if key != "principle")
# How to ask about principles: name -> (protocol, form). `reasoned` asks the same questions as
# pairwise, and `rating` the same as pointwise.
WAYS = {
    "pairwise": ("pairwise", "chat"),
    "pointwise, as chat": ("pointwise", "chat"),
    "pointwise, as text": ("pointwise", "text"),
}
EVERY, DRAWN = "every comparison", "comparisons that draw it"
MOVED, REST = "comparisons that draw it only now", "comparisons that had not drawn it"


def constitution_diff(a: Constitution, b: Constitution) -> dict[str, Any]:
    """{"changed": {key: [old, new]}, "principles": [...], "asks_again": {way: {id: which}}}.

    A way is null in `asks_again` if `b` lacks a question that it asks.
    """
    before, now = ({p.id: p for p in one.principle} for one in (a, b))
    principles = []
    for name in before | now:
        if name not in before or name not in now:
            principles.append({"id": name, "is": "new" if name in now else "gone", "changed": {}})
        elif moved := _changed(before[name], now[name], tuple(Principle.model_fields)):
            principles.append({"id": name, "is": "edited", "changed": moved})
    order = [name for name in before if name in now] != [name for name in now if name in before]
    return {
        "changed": _changed(a, b, HEAD),
        "principles": principles,
        "reordered": order,
        "asks_again": {name: _asks_again(a, b, *way) for name, way in WAYS.items()},
        "revise": _revise(a, b),
    }


def _revise(a: Constitution, b: Constitution) -> dict[str, Any]:
    """{"edited": ids of principles with new texts for the reviser, "draws_move": whether rounds may
    draw another principle}. A chain is asked again from the first round that has either."""
    before, now = ({p.id: p for p in one.principle if p.critique or p.revision} for one in (a, b))
    before_texts = [(p.critique, p.revision, p.revised) for p in before.values()]
    edited = [n for n, p in now.items() if (p.critique, p.revision, p.revised) not in before_texts]
    drawn, draws = ({name: p.weight for name, p in one.items()} for one in (before, now))
    return {"edited": edited, "draws_move": drawn != draws}


def _changed(a: Any, b: Any, keys: tuple[str, ...]) -> dict[str, list[Any]]:
    old, new = a.model_dump(), b.model_dump()
    return {key: [old[key], new[key]] for key in keys if old[key] != new[key]}


def _asks_again(a: Constitution, b: Constitution, protocol: str, form: str) -> dict | None:
    """{principle of `b` with a new question: the comparisons for which it is new}."""
    if not all(principle.question(protocol) for principle in b.principle):
        return None
    same = a.preamble == b.preamble
    digests = {p.digest(protocol, form) for p in a.principle if same and p.question(protocol)}
    again = {}
    for principle in b.principle:
        if principle.digest(protocol, form) not in digests:
            again[principle.id] = EVERY if b.principles == "all" else DRAWN
        elif a.principles == "sample" and b.principles == "all":
            again[principle.id] = REST
        elif a.principles == b.principles == "sample" and _draws_more(principle, a, b):
            again[principle.id] = MOVED
    return again


def _draws_more(principle: Principle, a: Constitution, b: Constitution) -> bool:
    """Whether a principle wins draws that it lost before: its weight grew, or another's fell.

    In `Constitution.drawn` each principle has its own clock, which depends on its id.
    """
    before, now = ({p.id: p.weight for p in one.principle} for one in (a, b))
    others = (name for name in before if name != principle.id)
    return principle.weight > before.get(principle.id, 0) or any(
        now.get(name, 0) < before[name] for name in others
    )
