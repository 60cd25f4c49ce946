"""Cards of one or several judges, to decide which of them to trust.

    pairs with people's choices -> judges/JUDGE/ (label) -> audit.json
                                -> canaries/JUDGE/ (label)

Every judge labels the same pairs, and its canaries, in its own run folders below RUN. Their
journals keep the answers: a second audit asks only what is new, and a killed audit goes on. Labels
of other runs, and verdicts recorded in the pairs' file, get the same statistics without a call.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from aif.auditing.attacks import Canary, canaries, flips
from aif.auditing.card import Judgement, judge_card, weight
from aif.auditing.verdict_counts import VerdictTable
from aif.config.settings import Settings, load_settings
from aif.data.human import Item, items_of, read_items
from aif.dependencies import require
from aif.errors import AifError, InputError
from aif.judge.panel import judge_of
from aif.llm import open_llm
from aif.llm.dispatch import Faults
from aif.progress import Progress
from aif.run import Run
from aif.stages.label import STAGE as LABELS
from aif.stages.label import label
from aif.stats.agreement import alpha, annotators, longer_wins
from aif.stats.intervals import Bootstrap
from aif.store.provenance import identity
from aif.store.records import Comparison, Label, Verdict, content_id

STAGE = "audit"
COST = "cost"
RECORDED = "recorded:"


@dataclass(frozen=True, slots=True)
class AuditedJudge:
    """A judge to audit. `run` has its labels; None if its verdicts are in the pairs' file. If the
    run has a panel, `member` is one judge of the panel, and None is the consensus."""

    name: str
    model: str
    run: Run | None
    member: str | None = None


def audit(run: Run, progress: Progress) -> dict[str, Any]:
    """Audit the judges of `run.settings.audit`; returns the content of audit.json and the failed
    calls, for `check_faults`.

    Raises Interrupted or JudgeStopped if it ended early; the same command goes on. Raises
    InputError or AifError if there is nothing to audit.
    """
    require("audit", "scipy", "sklearn", "krippendorff")
    settings = run.settings.audit
    bootstrap, faults = Bootstrap(settings.seed, settings.resamples), Faults()
    live = _live_judges(run)
    _check(live)
    items = _items(run)
    with run.writing():
        if live:
            run.keep_settings()
        for judge in live:
            progress.say(f"{judge.name}: {len(items):,} pairs")
            _label(judge.run, faults, progress)
        cards, outcomes = [], []
        for judge in (*live, *_recorded_judges(run), *_judges_of_runs(run)):
            judgements, verdicts = _read(judge, items)
            outcomes.append([judgement.outcome for judgement in judgements])
            card = judge_card(
                judgements, verdicts, judge.model, bootstrap, settings.seed, settings.calibrate
            )
            cards.append(_provenance(judge, verdicts) | card)
            if settings.canaries and judge.run and judge.member is None:
                cards[-1]["canaries"] = _canaries(run, judge, bootstrap, faults, progress)
        weights = {card["name"]: weight(card) for card in cards}
        state = {
            "run": str(run.path),
            "pairs": _source(run),
            "rows": len(items),
            "people": sum(item.people is not None for item in items),
            "split": sum(bool(item.choices) and item.people is None for item in items),
            "annotators": annotators([item.choices for item in items], bootstrap),
            "longer_wins": _longer_wins(items, bootstrap),
            "alpha": alpha(outcomes),  # across the judges
            "judges": cards,
            "weights": {name: w for name, w in weights.items() if w is not None},
            "seed": settings.seed,
        }
        run.write_state(STAGE, state)
    return state | faults.summary()


def _models(run: Run) -> list[str]:
    """The judges of `audit.judges`, or else the judges of the settings if `audit.pairs` is set."""
    settings = run.settings.audit
    own = [one.model for one in (run.settings.judge, *run.settings.panel)]
    default = own if settings.pairs and not settings.runs else []
    return list(dict.fromkeys(settings.judges or default))


def _recorded(run: Run) -> list[str]:
    """The columns of the pairs' file with recorded verdicts."""
    return [m.removeprefix(RECORDED) for m in _models(run) if m.startswith(RECORDED)]


def _source(run: Run) -> str | None:
    """The file of the pairs; None: the pairs of the first run that is audited."""
    settings = run.settings
    if settings.audit.pairs or not settings.audit.judges:
        return settings.audit.pairs
    if not settings.label.pairs:
        raise InputError("audit", "pairs", got="nothing", expected="--pairs HUMAN.jsonl")
    return settings.label.pairs


def _items(run: Run) -> list[Item]:
    source = _source(run)
    limit = run.settings.label.limit
    if source:
        items = list(read_items(source, limit, _recorded(run)))
    else:
        items = list(islice(items_of(_judges_of_runs(run)[0].run), limit))
    if not items:
        raise InputError(source or run.path, "", got="no pairs at all", expected="at least one")
    return items


def _live_judges(run: Run) -> list[AuditedJudge]:
    """The judges that label the pairs now, each in its own run."""
    models = [model for model in _models(run) if not model.startswith(RECORDED)]
    return [AuditedJudge(model, model, _run_of(run, model)) for model in models]


def _run_of(run: Run, model: str) -> Run:
    """The run in which a judge labels the pairs, alone and with the full protocol. A judge of the
    settings keeps its settings."""
    settings = run.settings
    own = {one.model: one for one in (*settings.panel, settings.judge)}
    alone = {"pairs": _source(run), "escalate_below": None, "budget": None}
    alone |= {"judge_weights": {}, "weights_from": None}
    return run.child(
        f"judges/{_folder(model)}",
        judge=own.get(model) or settings.judge.of_model(model),
        panel=[],
        label=settings.label.model_copy(update=alone),
    )


def _folder(name: str) -> str:
    """The folder name of a judge: its own name if possible, or else with a digest."""
    plain = re.sub("[^A-Za-z0-9_.-]", "-", name)[-48:].lstrip("_.-")
    return plain if plain == name else f"{plain or 'judge'}-{content_id('judge', name)[:8]}"


def _check(judges: Sequence[AuditedJudge]) -> None:
    """Raise InputError for a bad judge or constitution before any call."""
    for judge in judges:
        with open_llm(judge.run.settings.judge) as llm:
            _ = llm.control_tokens
        judge_of(judge.run.settings)


def _recorded_judges(run: Run) -> list[AuditedJudge]:
    return [AuditedJudge(name, name, None) for name in _recorded(run)]


def _judges_of_runs(run: Run) -> list[AuditedJudge]:
    """The judges of the labelled runs of `audit.runs`; of `run` itself if the settings name no run
    and no judge."""
    settings = run.settings
    folders = [Path(name) for name in settings.audit.runs]
    if not folders and not _models(run):
        folders = [run.path]
    alone = len(folders) == 1 and not _models(run)
    judges = []
    for folder in folders:
        own = Run(folder, _settings(run, folder))
        own.require("labels.jsonl")
        used = own.state(LABELS).get("judge")
        used_model = used.get("model") if isinstance(used, dict) else None
        model, members = used_model or own.settings.judge.model, _members(own)
        judges.append(AuditedJudge(model if alone and not members else str(folder), model, own))
        for member in members:
            name = member if alone else f"{folder}: {member}"
            judges.append(AuditedJudge(name, member, own, member))
    return judges


def _members(run: Run) -> list[str]:
    """The judges of a run's panel; empty if the run has only one judge."""
    return list(dict.fromkeys(n for row in run.read("labels.jsonl", Label) for n in row.by_judge))


def _settings(run: Run, folder: Path) -> Settings:
    if folder.resolve() == run.path.resolve():
        return run.settings
    return load_settings(folder / "run.toml", {})


def _label(run: Run, faults: Faults, progress: Progress) -> None:
    """Let a judge label its run. Counts `faults`, and keeps the calls and seconds in cost.json."""
    began = time.monotonic()
    summary = label(run, progress)
    seconds = time.monotonic() - began
    faults.include(summary)
    if summary["calls_made"]:
        before = run.state(COST)
        calls = before.get("calls", 0) + summary["calls_made"]
        run.write_state(COST, {"calls": calls, "seconds": before.get("seconds", 0) + seconds})


def _read(judge: AuditedJudge, items: Sequence[Item]) -> tuple[list[Judgement], VerdictTable]:
    """A judge's labels of the items and its verdicts. Raises AifError if it has no label."""
    table = VerdictTable()
    if judge.run is None:
        for item in items:
            for verdict in item.recorded[judge.name]:
                table.add(verdict, item.people, item.subset)
        return [Judgement(item, _recorded_label(judge.name, item)) for item in items], table
    by_id = {item.comparison_id: item for item in items}
    labels = judge.run.labels()
    if judge.member:
        labels = {key: _member_label(row, judge.member) for key, row in labels.items()}
    for verdict in judge.run.read("verdicts.jsonl", Verdict):
        item = by_id.get(verdict.comparison_id)
        if item and judge.member in (None, verdict.judge):
            table.add(verdict, item.people, item.subset)
    if not labels.keys() & by_id.keys():
        raise AifError(f"{judge.run.path}: none of its labels is of one of these pairs")
    return [Judgement(item, labels.get(item.comparison_id)) for item in items], table


def _member_label(row: Label, member: str) -> Label | None:
    """The label by one judge of a panel; None if it was not asked."""
    if member not in row.by_judge:
        return None
    p_first = row.by_judge[member]
    if p_first is None:
        return Label.null(row.comparison_id, row.fault or "unparsed")
    return Label(row.comparison_id, p_first, None, 0, None)


def _recorded_label(judge: str, item: Item) -> Label:
    """A recorded judge's label: its choice, or the mean of its choices in both orders; null if one
    of these is missing."""
    verdicts = item.recorded[judge]
    if not verdicts or any(verdict.p_first is None for verdict in verdicts):
        return Label.null(item.comparison_id, "unparsed")
    p_first = sum(verdict.p_first for verdict in verdicts) / len(verdicts)
    return Label(item.comparison_id, p_first, None, len(verdicts), None)


def _longer_wins(items: Sequence[Item], bootstrap: Bootstrap) -> dict[str, Any] | None:
    """How often people prefer the longer response, over all pairs that they decided."""
    people = [item.people for item in items]
    more_words = [item.more_words for item in items]
    return longer_wins(people, people, more_words, bootstrap)["people"]


def _provenance(judge: AuditedJudge, verdicts: VerdictTable) -> dict[str, Any]:
    """The judge's name, what its answers depend on (`used`), and its cost. `used` is empty for a
    member of a panel, since label.json describes the whole panel."""
    identified = {"name": judge.name, "model": judge.model}
    if judge.run is None:
        return identified | {"folder": None, "used": {}, "cost": None}
    cost = judge.run.state(COST)
    return identified | {
        "folder": str(judge.run.path),
        "used": {} if judge.member else identity(judge.run.state(LABELS)),
        "cost": {
            "calls": verdicts.paid.calls,
            "tokens": dict(verdicts.paid.tokens),
            "calls_timed": cost.get("calls"),
            "seconds": cost.get("seconds"),
        },
    }


def _canaries(
    run: Run, judge: AuditedJudge, bootstrap: Bootstrap, faults: Faults, progress: Progress
) -> dict[str, Any]:
    """Attack the first pairs with a winner, and ask the judge about them."""
    label_settings = judge.run.settings.label.model_copy(update={"pairs": None, "limit": None})
    settings = judge.run.settings.model_copy(update={"label": label_settings})
    sub = Run(run.file("canaries") / _folder(judge.name), settings, run.root)
    attacked = list(_attacks(judge.run, run.settings.audit.canaries))
    if not attacked:
        return {}
    sub.path.mkdir(parents=True, exist_ok=True)
    sub.write("comparisons.jsonl", {c.comparison.id: c.comparison for c in attacked}.values())
    progress.say(f"{judge.name}: {len(attacked):,} canaries")
    _label(sub, faults, progress)
    return flips(attacked, sub.labels(), bootstrap)


def _attacks(run: Run, most: int) -> Iterator[Canary]:
    """The attacks on the first `most` pairs that have any."""
    labels = run.labels()
    pairs = 0
    for row in run.read("comparisons.jsonl", Comparison):
        attacks = list(canaries(row, labels[row.id])) if row.id in labels else []
        pairs += bool(attacks)
        yield from attacks
        if pairs == most:
            return
