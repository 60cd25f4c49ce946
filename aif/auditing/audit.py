"""The report card of one or several judges, side by side: which of them to trust.

    pairs with people's choices -> judges/JUDGE/ (label) -> audit.json
                                -> canaries/JUDGE/ (label)

Every judge labels the same pairs in a run folder of its own below RUN, and so do the canaries.
What they were answered is in their journals, so that a second audit asks for what is new, and one
that was killed goes on. Labels that are there already, of other runs, and verdicts that a file has
recorded go through the same statistics; of those nothing is asked.
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
from aif.auditing.card import Judgement, Tallies, judge_card, weight
from aif.config.settings import Settings, load_settings
from aif.data.human import Item, items_of, read_items
from aif.dependencies import require
from aif.errors import AifError, InputError
from aif.judge.panel import constitution_path, judge_of
from aif.llm import open_llm
from aif.llm.dispatch import Faults
from aif.progress import Progress
from aif.run import Run
from aif.stages.label import STAGE as LABELS
from aif.stages.label import label
from aif.stats.agreement import alpha, annotators, longer_wins
from aif.stats.intervals import Bootstrap
from aif.stats.odds import Value, outcome
from aif.store.provenance import identity
from aif.store.records import Comparison, Label, Verdict, content_id

STAGE = "audit"
COST = "cost"
RECORDED = "recorded:"


@dataclass(frozen=True, slots=True)
class Judged:
    """A judge that is audited. `run` has its labels; None where they stand in the pairs' file. Of a
    run with a panel, `seat` is the judge of it that is meant; None is their consensus."""

    name: str
    model: str
    run: Run | None
    seat: str | None = None


def audit(run: Run, progress: Progress) -> dict[str, Any]:
    """Do what `run.settings.audit` says; returns what is kept as audit.json, and which calls
    failed (`asking.check_faults` says whether those are too many).

    Raises Interrupted or JudgeStopped when it ended early; the same command goes on. Raises
    InputError or AifError, one line, where there is nothing to audit.
    """
    require("audit", "scipy", "sklearn", "krippendorff")
    settings = run.settings.audit
    bootstrap, faults = Bootstrap(settings.seed, settings.resamples), Faults()
    asked = [_asked(run, model) for model in _models(run) if not model.startswith(RECORDED)]
    _check(asked)
    items = _items(run)
    with run.writing():
        if asked:
            run.keep_settings()
        for one in asked:
            progress.say(f"{one.name}: {len(items):,} pairs")
            _pay(one.run, faults, progress)
        judges = [*asked, *_recorded(run), *_labelled(run)]
        cards, said = [], []
        for one in judges:
            judgements, tallies = _read(one, items)
            said.append([_outcome(judgement.label) for judgement in judgements])
            card = judge_card(
                judgements, tallies, one.model, bootstrap, settings.seed, settings.calibrate
            )
            cards.append(_about(one, tallies) | card)
            if settings.canaries and one.run and one.seat is None:
                cards[-1]["canaries"] = _canaries(run, one, bootstrap, faults, progress)
        weights = {card["name"]: weight(card) for card in cards}
        state = {
            "run": str(run.path),
            "pairs": _source(run),
            "rows": len(items),
            "people": sum(item.people is not None for item in items),
            "split": sum(bool(item.choices) and item.people is None for item in items),
            "annotators": annotators([item.choices for item in items], bootstrap),
            "longer_wins": _longer_wins(items, bootstrap),
            "alpha": alpha(said),  # across the judges
            "judges": cards,
            "weights": {name: w for name, w in weights.items() if w is not None},
            "seed": settings.seed,
        }
        run.write_state(STAGE, state)
    return state | faults.summary()


def _models(run: Run) -> list[str]:
    """The judges that are named, or those of the settings where there are pairs for them."""
    settings = run.settings.audit
    seated = [one.model for one in (run.settings.judge, *run.settings.panel)]
    default = seated if settings.pairs and not settings.runs else []
    return list(dict.fromkeys(settings.judges or default))


def _source(run: Run) -> str | None:
    """The pairs that are held against people; None: those of the runs that are audited."""
    settings = run.settings
    if settings.audit.pairs or not settings.audit.judges:
        return settings.audit.pairs
    if not settings.label.pairs:
        raise InputError("audit", "pairs", got="nothing", expected="--pairs HUMAN.jsonl")
    return settings.label.pairs


def _items(run: Run) -> list[Item]:
    source = _source(run)
    columns = [m.removeprefix(RECORDED) for m in _models(run) if m.startswith(RECORDED)]
    limit = run.settings.label.limit
    if source:
        items = list(read_items(source, limit, columns))
    else:
        first = _labelled(run)[0].run
        items = list(islice(items_of(first), limit))
    if not items:
        raise InputError(source or run.path, "", got="no pairs at all", expected="at least one")
    return items


def _asked(run: Run, model: str) -> Judged:
    """A judge with the run in which it labels the pairs, alone and by the full protocol; asked as
    the settings ask it where they have it."""
    settings = run.settings
    seated = {one.model: one for one in (*settings.panel, settings.judge)}
    alone = {"pairs": _source(run), "escalate_below": None, "budget": None}
    alone |= {"judge_weights": {}, "weights_from": None}
    update = {
        "judge": seated.get(model) or settings.judge.of_model(model),
        "panel": [],
        "label": settings.label.model_copy(update=alone),
    }
    sub = Run(run.file("judges") / _folder(model), settings.model_copy(update=update), run.root)
    return Judged(model, model, sub)


def _folder(name: str) -> str:
    """A folder's name for a judge: its own where that can be one, else with a digest of it."""
    plain = re.sub("[^A-Za-z0-9_.-]", "-", name)[-48:].lstrip("_.-")
    return plain if plain == name else f"{plain or 'judge'}-{content_id('judge', name)[:8]}"


def _check(asked: Sequence[Judged]) -> None:
    """Raise InputError for a judge or a constitution that is none, before anyone is asked."""
    for one in asked:
        with open_llm(one.run.settings.judge) as llm:
            _ = llm.control_tokens
        judge_of(one.run.settings, constitution_path(one.run.settings))


def _recorded(run: Run) -> list[Judged]:
    """The judges whose verdicts stand in the pairs' file."""
    names = [m.removeprefix(RECORDED) for m in _models(run) if m.startswith(RECORDED)]
    return [Judged(name, name, None) for name in names]


def _labelled(run: Run) -> list[Judged]:
    """The judges of runs that are labelled: those that are named, or else, where no judge is, the
    run itself."""
    settings = run.settings
    folders = [Path(name) for name in settings.audit.runs]
    if not folders and not _models(run):
        folders = [run.path]
    found = []
    for folder in folders:
        own = Run(folder, _settings(run, folder))
        if not own.file("labels.jsonl").exists():
            raise AifError(f"{folder}: no labels yet; `aif label --out {folder}` makes them")
        used = own.state(LABELS).get("judge")
        told = used.get("model") if isinstance(used, dict) else None
        model, seats = told or own.settings.judge.model, _seats(own)
        alone = len(folders) == 1 and not _models(run)
        found.append(Judged(model if alone and not seats else str(folder), model, own))
        found += [Judged(seat if alone else f"{folder}: {seat}", seat, own, seat) for seat in seats]
    return found


def _seats(run: Run) -> list[str]:
    """The judges of a run's panel; none where it has one judge alone."""
    return list(dict.fromkeys(n for row in run.read("labels.jsonl", Label) for n in row.by_judge))


def _settings(run: Run, folder: Path) -> Settings:
    if folder.resolve() == run.path.resolve():
        return run.settings
    return load_settings(folder / "run.toml", {})


def _pay(run: Run, faults: Faults, progress: Progress) -> None:
    """Have a judge label its run. Counts `faults`, and keeps what the calls took."""
    began = time.monotonic()
    summary = label(run, progress)
    seconds = time.monotonic() - began
    faults.calls += summary["verdicts"]
    faults.kinds.update(summary["faults"])
    faults.details |= summary["fault_details"]
    if summary["calls_made"]:
        before = run.state(COST)
        run.write_state(
            COST,
            {
                "calls": before.get("calls", 0) + summary["calls_made"],
                "seconds": before.get("seconds", 0) + seconds,
            },
        )


def _read(one: Judged, items: Sequence[Item]) -> tuple[list[Judgement], Tallies]:
    """What a judge said of each item; raises AifError where that is nothing."""
    tallies = Tallies()
    if one.run is None:
        judgements = [Judgement(item, _of_record(one.name, item, tallies)) for item in items]
        return judgements, tallies
    by_id = {item.comparison_id: item for item in items}
    labels = {row.comparison_id: row for row in one.run.read("labels.jsonl", Label)}
    if one.seat:
        labels = {name: _of_seat(row, one.seat) for name, row in labels.items()}
    for verdict in one.run.read("verdicts.jsonl", Verdict):
        item = by_id.get(verdict.comparison_id)
        if item and one.seat in (None, verdict.judge):
            tallies.add(verdict, item)
    if not labels.keys() & by_id.keys():
        raise AifError(f"{one.run.path}: none of its labels is of one of these pairs")
    return [Judgement(item, labels.get(item.comparison_id)) for item in items], tallies


def _of_seat(row: Label, seat: str) -> Label | None:
    """What one judge of a panel says of a pair; None where it was not asked."""
    if seat not in row.by_judge:
        return None
    p_first = row.by_judge[seat]
    if p_first is None:
        return Label.null(row.comparison_id, row.fault or "unparsed")
    return Label(row.comparison_id, p_first, None, 0, None)


def _of_record(judge: str, item: Item, tallies: Tallies) -> Label:
    """A recorded judge's label: its choice, or the mean of its choices in both orders, and null
    where one of these is missing."""
    verdicts = item.recorded[judge]
    for verdict in verdicts:
        tallies.add(verdict, item)
    if not verdicts or any(verdict.p_first is None for verdict in verdicts):
        return Label.null(item.comparison_id, "unparsed")
    p_first = sum(verdict.p_first for verdict in verdicts) / len(verdicts)
    return Label(item.comparison_id, p_first, None, len(verdicts), None)


def _longer_wins(items: Sequence[Item], bootstrap: Bootstrap) -> dict[str, Any] | None:
    """How often people prefer the longer response, whatever a judge says of the pair."""
    people = [item.people for item in items]
    more_words = [item.more_words for item in items]
    return longer_wins(people, people, more_words, bootstrap)["people"]


def _outcome(label: Label | None) -> Value:
    return outcome(label.p_first) if label else None


def _about(one: Judged, tallies: Tallies) -> dict[str, Any]:
    """Who the judge is, how it was asked and what that took. One of a panel is not known by itself
    from what the panel used."""
    if one.run is None:
        return {"name": one.name, "model": one.model, "folder": None, "used": {}, "cost": None}
    used = one.run.state(LABELS)
    cost = one.run.state(COST)
    return {
        "name": one.name,
        "model": one.model,
        "folder": str(one.run.path),
        "used": {} if one.seat else identity(used),
        "cost": {
            "calls": tallies.paid.calls,
            "tokens": dict(tallies.paid.tokens),
            "calls_timed": cost.get("calls"),
            "seconds": cost.get("seconds"),
        },
    }


def _canaries(
    run: Run, one: Judged, bootstrap: Bootstrap, faults: Faults, progress: Progress
) -> dict[str, Any]:
    """Attack the first pairs that the judge has decided, and ask it again."""
    label_settings = one.run.settings.label.model_copy(update={"pairs": None, "limit": None})
    settings = one.run.settings.model_copy(update={"label": label_settings})
    sub = Run(run.file("canaries") / _folder(one.name), settings, run.root)
    found = list(_attacks(one.run, run.settings.audit.canaries))
    if not found:
        return {}
    sub.path.mkdir(parents=True, exist_ok=True)
    sub.write("comparisons.jsonl", {c.comparison.id: c.comparison for c in found}.values())
    progress.say(f"{one.name}: {len(found):,} canaries")
    _pay(sub, faults, progress)
    labels = {row.comparison_id: row for row in sub.read("labels.jsonl", Label)}
    return flips(found, labels, bootstrap)


def _attacks(run: Run, most: int) -> Iterator[Canary]:
    labels = {row.comparison_id: row for row in run.read("labels.jsonl", Label)}
    attacked = 0
    for row in run.read("comparisons.jsonl", Comparison):
        found = list(canaries(row, labels[row.id])) if row.id in labels else []
        attacked += bool(found)
        yield from found
        if attacked == most:
            return
