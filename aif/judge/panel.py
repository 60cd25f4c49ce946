"""The judges of a run: which calls a comparison needs, and its label.

    [judge]                                [label]
    model = "openai:small"                 consensus = "mean"        # or majority, unanimous
    [[panel]]                              escalate_below = 0.2      # margin |2p - 1|
    model = "openai:large"                 escalate = "panel"        # or orders, reasoned

Every judge is asked about every comparison. With `label.escalate_below` there is a cheap first
pass: in one order only ("orders"), by the first judge only ("panel") or without reasons
("reasoned"). The full pass is made only if the first one leaves a comparison open. Which calls are
needed is a function of the answers in the journal, so an interrupted run goes on where it stopped,
and a new threshold asks only what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aif.config.settings import LabelSettings, LLMSettings, Settings
from aif.constitution import file as constitutions
from aif.errors import InputError, shown
from aif.judge.aggregate import ROUNDING, aggregate_judges, aggregate_verdicts
from aif.judge.judge import Judge, JudgeCall, PaidVerdict
from aif.store import jsonl
from aif.store.journal import Reader
from aif.store.records import SERVICE_FAULTS, Comparison, Label

JudgeCalls = list[tuple[Judge, list[JudgeCall]]]  # calls about one comparison, judge by judge


class Panel:
    """The judges of a run, one or several. `panel_of` builds it from settings.

    `reasoned` are the same judges with the protocol "reasoned", for the full pass.
    """

    def __init__(
        self,
        judges: Sequence[Judge],
        label: LabelSettings,
        weights: Mapping[str, float],
        reasoned: Sequence[Judge] = (),
    ):
        self.judges = [*judges, *reasoned]
        self.weights = weights
        self.several = len(judges) > 1
        self.escalates = label.escalate_below is not None
        self._label = label
        self._escalate = label.escalate if self.escalates else None
        self._first_judges = judges[:1] if self._escalate == "panel" else judges
        self._full_judges = reasoned or judges

    def judged(
        self, comparison: Comparison, journal: Reader
    ) -> tuple[list[PaidVerdict], Label | None]:
        """The verdicts on a comparison and its label; None if a call that it needs is missing."""
        verdicts, label = self._label_of(self._first_pass(comparison), comparison, journal)
        if label is None or not self._is_open(label):
            return verdicts, label
        more, label = self._label_of(self.full_pass(comparison), comparison, journal)
        ids = {verdict.id for verdict, _ in verdicts}
        return verdicts + [paid for paid in more if paid[0].id not in ids], label

    def needed(self, comparison: Comparison, journal: Reader) -> tuple[JudgeCalls, JudgeCalls]:
        """(the calls that a comparison needs by the answers so far, those that it needs too if the
        first pass leaves it open, which is not known yet)."""
        first_pass = self._first_pass(comparison)
        if not self.escalates:
            return first_pass, []
        _, label = self._label_of(first_pass, comparison, journal)
        if label is None:
            return first_pass, self.full_pass(comparison)
        return first_pass + (self.full_pass(comparison) if self._is_open(label) else []), []

    def full_pass(self, comparison: Comparison) -> JudgeCalls:
        """The calls behind the label of an open comparison: without escalation, of every one."""
        return [(judge, judge.calls_for(comparison)) for judge in self._full_judges]

    def _first_pass(self, comparison: Comparison) -> JudgeCalls:
        """The calls that every comparison needs."""
        by_order = self._escalate == "orders"
        return [
            (judge, judge.calls_for(comparison, judge.one_order(comparison) if by_order else None))
            for judge in self._first_judges
        ]

    def _is_open(self, label: Label) -> bool:
        """Whether the label of the first pass is too close to even.

        A null label is open too if another judge may answer. It is not after a service fault: the
        first judge is asked again.
        """
        below = self._label.escalate_below
        if below is None or label.fault == "identical":
            return False
        if label.p_first is None:
            return self._escalate != "orders" and label.fault not in SERVICE_FAULTS
        # Less the rounding, so that p and 1 - p are on one side of a threshold; 1 is for all.
        return below == 1 or abs(2 * label.p_first - 1) < below - ROUNDING

    def _label_of(
        self, calls: JudgeCalls, comparison: Comparison, journal: Reader
    ) -> tuple[list[PaidVerdict], Label | None]:
        """The verdicts of these calls, and the label; None if one of them was never made."""
        verdicts: list[PaidVerdict] = []
        labels: dict[str, Label] = {}
        for judge, own_calls in calls:
            own = judge.verdicts(own_calls, comparison, journal)
            verdicts += own
            labels[judge.name] = aggregate_verdicts(
                comparison,
                [verdict for verdict, _ in own],
                judge.constitution,
                judge.protocol,
                self._label.quorum,
                list(dict.fromkeys(call.order for call in own_calls)),
            )
        if len(verdicts) < sum(len(own_calls) for _, own_calls in calls):
            return verdicts, None
        if not self.several:
            (label,) = labels.values()
            return verdicts, label
        rule, quorum = self._label.consensus, self._label.quorum
        return verdicts, aggregate_judges(labels, rule, self.weights, quorum)

    def rules(self) -> dict[str, Any]:
        """How labels are made: the consensus of several judges, and when more are asked."""
        rules: dict[str, Any] = {}
        if self.several:
            rules["consensus"] = {"rule": self._label.consensus, "weights": self.weights}
        if self.escalates:
            label = self._label
            rules["escalation"] = {"below": label.escalate_below, "by": label.escalate}
        return rules


@dataclass
class EscalationStats:
    """The distinct calls behind labels, and those of the full pass for every comparison."""

    panel: Panel
    comparisons: int = 0  # that got the full pass
    needed: set[bytes] = field(default_factory=set)
    full: set[bytes] = field(default_factory=set)

    def add(self, comparison: Comparison, verdicts: Sequence[PaidVerdict]) -> None:
        """Count a comparison that has a label, with its verdicts."""
        calls = self.panel.full_pass(comparison)
        full = {call.digest for _, own_calls in calls for call in own_calls}
        needed = {bytes.fromhex(verdict.id) for verdict, _ in verdicts}
        self.full |= full
        self.needed |= needed
        self.comparisons += bool(full) and full <= needed

    def summary(self) -> dict[str, int]:
        """How many comparisons got the full pass, and how many calls labels needed, of how many."""
        return {
            "comparisons": self.comparisons,
            "calls": len(self.needed),
            "calls_of_all": len(self.full),
        }


def constitution_path(settings: Settings) -> Path:
    """The file of `label.constitution`, or else of `revise.constitution`; InputError if both are
    unset."""
    path = settings.label.constitution or settings.revise.constitution
    if not path:
        raise InputError("label", "constitution", got="nothing", expected="--constitution FILE")
    return Path(path)


def judge_of(
    settings: Settings,
    model: LLMSettings | None = None,
    label: LabelSettings | None = None,
    name: str = "",
) -> Judge:
    """The judge of the settings, `[judge]` and `[label]` unless others are passed. Raises
    InputError for a constitution that is missing or does not fit the protocol."""
    path = constitution_path(settings)
    judge = Judge(constitutions.load(path), model or settings.judge, label or settings.label, name)
    judge.constitution.require(judge.protocol, path)
    return judge


def panel_of(settings: Settings) -> Panel:
    """The judges of the settings: `[judge]`, then each `[[panel]]`.

    A judge's name is its model, with a number from the second of the same model on. Raises
    InputError for a judge that is there twice, for weights of unknown judges, and for an
    escalation that has nothing more to ask.
    """
    label = settings.label
    judges: list[Judge] = []
    for model in (settings.judge, *settings.panel):
        number = 1 + sum(judge.model.model == model.model for judge in judges)
        name = f"{model.model}#{number}" if number > 1 else model.model
        judge = judge_of(settings, model, name=name)
        if any(judge.question_ids == other.question_ids for other in judges):
            raise InputError(
                "panel", "model", got=f"{model.model} twice", expected="judges that differ"
            )
        judges.append(judge)
    weights = _weights(label, [judge.name for judge in judges])
    _check_escalation(label, judges, weights)
    reasoned: list[Judge] = []
    if label.escalate_below is not None and label.escalate == "reasoned":
        # A template of one's own is for the protocol of the first pass.
        deeper = label.model_copy(update={"protocol": "reasoned", "template": None})
        for judge in judges:
            name = f"{judge.name}, reasoned"
            reasoned.append(judge_of(settings, judge.model, deeper, name))
            weights[name] = weights[judge.name]
    return Panel(judges, label, weights, reasoned)


def _weights(label: LabelSettings, names: Sequence[str]) -> dict[str, float]:
    """The weight of each judge: `label.judge_weights`, else the audit's, else 1."""
    unknown = label.judge_weights.keys() - set(names)
    if unknown:
        raise InputError(
            "label", "judge_weights", got=shown(min(unknown)), expected=f"one of {', '.join(names)}"
        )
    defaults = dict.fromkeys(names, 1.0)
    if label.weights_from:
        defaults = _audited_weights(Path(label.weights_from))
    weights = defaults | label.judge_weights
    for name in names:
        if name not in weights:
            raise InputError(
                label.weights_from, "weights", got=f"nothing for {name}", expected="every judge"
            )
    weights = {name: weights[name] for name in names}
    if not sum(weights.values()):
        raise InputError("label", "judge_weights", got="0 for all", expected="one above 0")
    return weights


def _audited_weights(path: Path) -> dict[str, float]:
    """The weights that `aif audit` wrote."""
    try:
        audit = jsonl.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        raise InputError(path, "", got="no such JSON", expected="what `aif audit` wrote") from None
    weights = audit.get("weights") if isinstance(audit, dict) else None
    if not isinstance(weights, dict) or not all(
        isinstance(weight, int | float) and weight >= 0 for weight in weights.values()
    ):
        got = shown(json.dumps(weights))
        raise InputError(path, "weights", got=got, expected="judges with a number from 0")
    return weights


def _check_escalation(
    label: LabelSettings, judges: Sequence[Judge], weights: Mapping[str, float]
) -> None:
    if label.escalate_below is None:
        return
    if label.escalate == "panel":
        if len(judges) < 2:
            raise InputError("label", "escalate", got="'panel', of one judge", expected="[[panel]]")
        if not weights[judges[0].name]:
            raise InputError(
                "label", "judge_weights", got=f"0 for {judges[0].name}",
                expected="more, as it is asked first and mostly alone",
            )  # fmt: skip
    elif label.escalate == "reasoned":
        if any(judge.protocol == "reasoned" for judge in judges):
            raise InputError(
                "label", "escalate", got="'reasoned', of judges that reason at once",
                expected="another label.protocol, for the cheap pass",
            )  # fmt: skip
    elif not any(judge.compares for judge in judges):
        raise InputError(
            "label", "escalate", got="'orders', of single responses",
            expected="a protocol that shows both, as label.protocol = \"pairwise\"",
        )  # fmt: skip
