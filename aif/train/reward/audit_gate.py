"""May a reward model learn from a run's labels? What the audit of their judge has to say.

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
    labels and it is as good as `reward.require_audit` asks. Labels alone are asked about."""
    wanted = run.settings.reward.require_audit
    if wanted is None or "labels" not in run.settings.reward.data:
        return
    path = run.file("audit.json")
    again = f"`aif audit --pairs HUMAN.jsonl --out {run.path}`"
    if not path.exists():
        raise AifError(f"{path}: not there, but reward.require_audit asks for it; {again} makes it")
    used = identity(run.state("label"))
    cards = [card for card in run.state("audit").get("judges", []) if card.get("used") == used]
    if not used or not cards:
        judge = used.get("judge")
        told = judge.get("model") if isinstance(judge, dict) else judge
        raise AifError(
            f"{path}: has no card of the judge and constitution that made the labels "
            f"({shown(told)}); {again} makes one"
        )
    if short := list(_short(cards[0], wanted)):
        raise AifError(f"{path}: reward.require_audit does not hold: {'; '.join(short)}")


def _short(card: Mapping[str, Any], wanted: RequireAudit) -> Iterator[str]:
    """What a card falls short in. A judge that grades responses one by one has no position to be
    biased to."""
    if wanted.agreement is not None:
        found = card["agreement"]["mean"]
        if found is None or found < wanted.agreement:
            yield f"agreement {_told(found)}, at least {wanted.agreement:g} is asked"
    if wanted.position_bias is not None and card["position"]:
        found = card["position"]["bias"]
        if found is None or abs(found) > wanted.position_bias:
            yield f"position bias {_told(found)}, at most {wanted.position_bias:g} is asked"
    if wanted.fault_rate is not None:
        found = card["fault_rate"]
        if found is None or found > wanted.fault_rate:
            yield f"fault rate {_told(found)}, at most {wanted.fault_rate:g} is asked"


def _told(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
