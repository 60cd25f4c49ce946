"""Which labels flipped between two labellings of the same comparisons, and under which principles.

    aif diff runs/first runs/second           two runs
    aif diff runs/first --constitution FILE   a run, and the labels of its stored answers under FILE

Comparisons are joined by their ids, which depend on their texts. If the other run has a pair in the
other order, its label is swapped. It makes no call and locks no run, so a stage may be writing to
either run. Each row of diff.jsonl is a flip; the largest change of probability is first:

    {"comparison_id": "9f0c...", "moved": 0.51, "prompt": [...], "first": "...", "second": "...",
     "a": {"p_first": 0.31, "by_principle": {"kindness": 0.2}, "verdicts": [...]}, "b": {...}}
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from aif.dependencies import require
from aif.errors import AifError, InputError
from aif.judge.panel import constitution_path, panel_of
from aif.judge.provenance import changes, facts
from aif.run import Run
from aif.stages.label import STAGE, comparisons
from aif.stats.agreement import kappa
from aif.stats.intervals import wilson
from aif.stats.odds import outcome
from aif.store import jsonl
from aif.store.records import Comparison, Label, Verdict

FILE = "diff.jsonl"


@dataclass(frozen=True, slots=True)
class Labelling:
    """Labels and their verdicts; each call reads them again."""

    name: str
    run: Run  # the run of the comparisons
    used: dict[str, Any]  # as `provenance.facts`; {} if it is not known
    labels: Callable[[], Iterator[Label]]
    verdicts: Callable[[set[str]], Iterator[Verdict]]  # on the comparisons of these ids
    notes: tuple[str, ...] = ()


class Flip(NamedTuple):
    """Two labels of one comparison with different winners, in the order of B's pair."""

    moved: float
    a: Label
    b: Label
    id_a: str


@dataclass
class LabelAgreement:
    """How well the probabilities of two labellings agree."""

    outcomes: Counter[tuple[float, float]] = field(default_factory=Counter)
    moved: float = 0.0

    def add(self, p_a: float, p_b: float) -> None:
        self.outcomes[outcome(p_a), outcome(p_b)] += 1
        self.moved += abs(p_a - p_b)

    def summary(self) -> dict[str, Any]:
        """Two labels agree if they have the same winner; a tie and a winner agree by half.

        The 95 % interval is Wilson's. It assumes independent comparisons, but comparisons of one
        prompt are slightly dependent. Kappa uses the same halves; it is null if both labellings
        have only one outcome.
        """
        n = self.outcomes.total()
        counts = {"n": n, "flips": self.outcomes[0.0, 1.0] + self.outcomes[1.0, 0.0]}
        if not n:
            return counts | dict.fromkeys(("agreement", "interval", "kappa", "moved"))
        agree = sum(times * (1 - abs(a - b)) for (a, b), times in self.outcomes.items())
        return counts | {
            "agreement": agree / n,
            "interval": list(wilson(agree, n)),
            "kappa": kappa(self.outcomes, halves=True),
            "moved": self.moved / n,  # mean absolute difference of p_first
        }


def diff(run: Run, other: Run | None, to: Path | None = None, show: int = 5) -> dict[str, Any]:
    """Compare the labels of `run` (A) with the labels of `other` (B). Without `other`, B has the
    labels of the answers in the journal of `run` under its present settings.

    Writes the flips to `to` (default: diff.jsonl in B's run) and returns the statistics with the
    first `show` flips. Raises InputError or AifError if there is nothing to compare.
    """
    require("diff", "scipy", "sklearn")
    if other and run.path.resolve() == other.path.resolve():
        raise InputError("diff", "RUN_B", got=f"{other.path} twice", expected="another run")
    target = to or (other or run).file(FILE)
    a = _written(run)
    with _second(run, other) as b:
        swapped, counts = _join(a, b)
        summary, flips = _compare(a, b, swapped)
        flips.sort(key=lambda flip: -flip.moved)  # a stable sort: ties stay in B's order
        rows = _rows(a, b, flips)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AifError(f"{target}: could not be written: {error.strerror}") from error
    jsonl.write(target, rows)
    return {
        "a": a.name,
        "b": b.name,
        "differences": changes(a.used, b.used) if a.used and b.used else None,
        "notes": [*a.notes, *b.notes],
        "comparisons": counts,
        **summary,
        "file": str(target),
        "largest": rows[:show],
    }


def _written(run: Run) -> Labelling:
    """The labelling in a run's files."""
    run.require("labels.jsonl")
    used, notes = run.state(STAGE), ()
    if used.get("in_progress"):  # label.json is new, labels.jsonl is still old
        used = {}
        notes = (f"{run.path}: labelling goes on or was cut off; its labels are of before",)
    return Labelling(
        name=str(run.path),
        run=run,
        used=used if "constitution" in used else {},
        labels=lambda: run.read("labels.jsonl", Label),
        verdicts=lambda ids: (
            verdict
            for verdict in run.read("verdicts.jsonl", Verdict)
            if verdict.comparison_id in ids
        ),
        notes=notes,
    )


def _second(run: Run, other: Run | None) -> AbstractContextManager[Labelling]:
    return nullcontext(_written(other)) if other else _from_answers(run)


@contextmanager
def _from_answers(run: Run) -> Iterator[Labelling]:
    """The labelling that the settings make of a run's stored answers."""
    panel = panel_of(run.settings)
    names = ", ".join(judge.name for judge in panel.judges)
    with run.answers(STAGE) as journal:

        def rows() -> Iterator[tuple[Comparison, list[Verdict], Label | None]]:
            for comparison in comparisons(run):
                pairs, label = panel.judged(comparison, journal)
                yield comparison, [verdict for verdict, _ in pairs], label

        yield Labelling(
            name=f"{constitution_path(run.settings)}, by {names}",
            run=run,
            used=facts(panel, run.settings, {}),
            labels=lambda: (label for _, _, label in rows() if label),
            verdicts=lambda ids: (
                verdict
                for comparison, verdicts, _ in rows()
                if comparison.id in ids
                for verdict in verdicts
            ),
        )


def _join(a: Labelling, b: Labelling) -> tuple[dict[str, str], dict[str, int]]:
    """({id in B: id in A} of the pairs in the other order, counts of the pairs in one and both)."""
    ids_a, ids_b = ({row.id for row in _comparisons(one.run)} for one in (a, b))
    both = len(ids_a & ids_b)
    swapped = {}
    for row in _comparisons(b.run) if both < len(ids_b) else ():
        if row.id not in ids_a:
            id_a = row.swapped().id
            if id_a in ids_a and id_a not in ids_b:  # else B has the pair both ways
                swapped[row.id] = id_a
    both += len(swapped)
    if not both:
        raise AifError(f"{a.name} and {b.name}: no comparison is in both")
    counts = {"both": both, "turned": len(swapped)}
    return swapped, counts | {"only_a": len(ids_a) - both, "only_b": len(ids_b) - both}


def _comparisons(run: Run) -> Iterator[Comparison]:
    return run.read("comparisons.jsonl", Comparison)


def _compare(
    a: Labelling, b: Labelling, swapped: dict[str, str]
) -> tuple[dict[str, Any], list[Flip]]:
    """The agreement of the labels that are in both, and the labels that flipped."""
    before = {label.comparison_id: label for label in a.labels()}
    every, by_principle, flips = LabelAgreement(), defaultdict(LabelAgreement), []
    gained, lost, labels = Counter(), Counter(), Counter()
    for now in b.labels():
        labels["b"] += 1
        id_a = swapped.get(now.comparison_id, now.comparison_id)
        if (was := before.get(id_a)) is None:
            continue
        labels["both"] += 1
        if id_a != now.comparison_id:
            was = was.swapped()
        for name in was.by_principle.keys() & now.by_principle.keys():
            p_a, p_b = was.by_principle[name], now.by_principle[name]
            if p_a is not None and p_b is not None:
                by_principle[name].add(p_a, p_b)
        if was.p_first is None and now.p_first is None:
            labels["null_in_both"] += 1
        elif now.p_first is None:
            gained[now.fault] += 1
        elif was.p_first is None:
            lost[was.fault] += 1
        else:
            every.add(was.p_first, now.p_first)
            if {outcome(was.p_first), outcome(now.p_first)} == {0.0, 1.0}:
                flips.append(Flip(abs(was.p_first - now.p_first), was, now, id_a))
    if not labels["both"]:
        raise AifError(
            f"{a.name} and {b.name}: no comparison has a label in both, "
            "as calls are missing; `aif plan` says which"
        )
    summary = {
        "labels": {"a": len(before), "b": labels["b"], "both": labels["both"]},
        "nulls": {"both": labels["null_in_both"], "gained": dict(gained), "lost": dict(lost)},
        "all": every.summary(),
        "by_principle": {name: by_principle[name].summary() for name in sorted(by_principle)},
    }
    return summary, flips


def _rows(a: Labelling, b: Labelling, flips: list[Flip]) -> list[dict[str, Any]]:
    """A row for each flip, with the texts and the verdicts of both labellings."""
    ids = {flip.b.comparison_id for flip in flips}
    texts = {row.id: row for row in _comparisons(b.run) if row.id in ids}
    if len(texts) < len(ids):
        raise AifError(f"{b.run.path}: its comparisons have just changed; try again")
    verdicts_a = _verdicts(a, {flip.id_a for flip in flips})
    verdicts_b = _verdicts(b, ids)
    rows = []
    for flip in flips:
        row = texts[flip.b.comparison_id]
        was = verdicts_a[flip.id_a]
        rows.append(
            {
                "comparison_id": row.id,
                "moved": flip.moved,
                "prompt": row.prompt,
                "first": row.first,
                "second": row.second,
                "a": _half(flip.a, was if flip.id_a == row.id else map(Verdict.swapped, was)),
                "b": _half(flip.b, verdicts_b[row.id]),
            }
        )
    return rows


def _verdicts(labelling: Labelling, ids: set[str]) -> dict[str, list[Verdict]]:
    """The verdicts on some comparisons, by comparison."""
    by_comparison = defaultdict(list)
    for verdict in labelling.verdicts(ids) if ids else ():
        by_comparison[verdict.comparison_id].append(verdict)
    return by_comparison


def _half(label: Label, verdicts: Iterable[Verdict]) -> dict[str, Any]:
    keys = ("principle_id", "order", "judge", "text", "p_first", "fault")
    return {
        "p_first": label.p_first,
        "by_principle": label.by_principle,
        "verdicts": [{key: getattr(row, key) for key in keys} for row in verdicts],
    }
