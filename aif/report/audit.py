"""The audit's part of the page: judges side by side, and which of them to trust."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aif.auditing.attacks import KINDS
from aif.auditing.schema import Audit, JudgeCard
from aif.report.charts import Dot, calibration, forest
from aif.report.overview import named
from aif.report.schema import state
from aif.run import Run


def audit_cards(run: Run) -> dict[str, Any] | None:
    """The judges' cards as tables and charts; None if the run has no audit."""
    audit = state(run, "audit", Audit)
    if audit is None:
        return None
    agreement, longer, calibrations = [], [], []
    for card in audit.judges:
        name, people = named(card.name), card.longer_wins.people
        agreement.append(Dot.of(name, card.agreement))
        longer.append(Dot.of(name, card.longer_wins.judge, people and people.mean))
        calibrations.append((name, card.calibration))
    axes = ("confidence in the winner", "share of choices that agree")
    charts = (
        forest("audit-agreement", "Agreement with people", agreement, "share"),
        forest(
            "audit-longer", "How often the longer response wins", longer, "share", mark="people"
        ),
        calibration("audit-calibration", "Calibration", calibrations, axes),
    )
    return {
        "audit": audit,
        "rows": [row for card in audit.judges for row in _rows(audit, card)],
        "canaries": [
            (named(card.name), [card.canaries.get(kind) for kind in KINDS])
            for card in audit.judges
            if card.canaries
        ],
        "kinds": KINDS,
        "charts": [chart for chart in charts if chart],
    }


def _rows(audit: Audit, card: JudgeCard) -> Iterator[dict[str, Any]]:
    """A row for a judge, and one for each principle and subset if there are several."""
    name, weight = named(card.name), audit.weights.get(card.name)
    yield {"name": name, "part": "", "stats": card, "card": card, "weight": weight}
    for parts in (card.by_principle, card.by_subset):
        for part, stats in parts.items() if len(parts) > 1 else ():
            yield {"name": name, "part": part, "stats": stats, "card": None, "weight": None}
