"""A check of the judge's audit before a reward model learns from its labels.

[reward]
require_audit = { agreement = 0.7, position_bias = 0.2, fault_rate = 0.02 }
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from aif.config.settings import RequireAudit
from aif.errors import AifError, shown
from aif.run import Run
from aif.store.provenance import identity


def check_audit(run: Run) -> None:
    """Raise AifError, one line, unless RUN/audit.json has a card of the judge that made the run's
    labels, as good as `reward.require_audit`. Data without labels needs no audit."""
    required = run.settings.reward.require_audit
    if required is None or "labels" not in run.settings.reward.data:
        return
    path = run.file("audit.json")
    again = f"`aif audit --pairs HUMAN.jsonl --out {run.path}`"
    if not path.exists():
        raise AifError(f"{path}: not there, but reward.require_audit asks for it; {again} makes it")
    used = identity(run.state("label"))
    cards = [card for card in run.state("audit").get("judges", []) if card.get("used") == used]
    if not used or not cards:
        judge = used.get("judge")
        model = judge.get("model") if isinstance(judge, dict) else judge
        raise AifError(
            f"{path}: has no card of the judge and constitution that made the labels "
            f"({shown(model)}); {again} makes one"
        )
    if short := list(_shortfalls(cards[0], required)):
        raise AifError(f"{path}: reward.require_audit does not hold: {'; '.join(short)}")


def _shortfalls(card: Mapping[str, Any], required: RequireAudit) -> Iterator[str]:
    """Where a card is worse than required. A judge that grades responses one by one has no position
    bias."""
    least, most, faults = required.agreement, required.position_bias, required.fault_rate
    if least is not None:
        agreement = card["agreement"]["mean"]
        if agreement is None or agreement < least:
            yield f"agreement {_number(agreement)}, at least {least:g} is required"
    if most is not None and card["position"]:
        bias = card["position"]["bias"]
        if bias is None or abs(bias) > most:
            yield f"position bias {_number(bias)}, at most {most:g} is required"
    if faults is not None:
        rate = card["fault_rate"]
        if rate is None or rate > faults:
            yield f"fault rate {_number(rate)}, at most {faults:g} is required"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
