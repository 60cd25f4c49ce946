"""Label comparisons with a judge, or several, under a constitution.

    pairs -> comparisons.jsonl -> (calls, journal/label.jsonl) -> verdicts.jsonl + labels.jsonl

A call whose id is in the journal is never made again, whatever else changed; a call whose id is not
there is made, whether the run is new, was killed, or had its constitution edited.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

from aif.config.settings import LLMSettings
from aif.data.readers import read_pairs, unique
from aif.errors import AifError, BudgetSpent, InputError, JudgeStopped
from aif.judge.calls import Work, asks_for, constitution_path
from aif.judge.panel import Panel, Saving, Seat, models_of, panel_of, summed, turns
from aif.judge.provenance import changes, facts
from aif.llm import open_llm
from aif.llm.budget import Meter
from aif.llm.dispatch import Faults, Tally, ask_all
from aif.llm.usage import Paid
from aif.progress import Progress
from aif.run import Run
from aif.store import jsonl
from aif.store.journal import Journal
from aif.store.records import Comparison, HumanChoice, as_row

STAGE = "label"
SLICE, SLICES = 64, 20  # comparisons in a slice at least, and slices at most


def label(run: Run, progress: Progress) -> dict[str, Any]:
    """Do what `run.settings` says; returns the summary, which is also kept as label.json.

    Raises Interrupted, JudgeStopped or BudgetSpent when it ended early; the files are in order all
    the same. Whether the summary has more faults than allowed is `asking.check_faults`' to say.
    """
    path = constitution_path(run)
    panel = panel_of(run, path, [known_to(run, model) for model in models_of(run.settings)])
    with run.writing():
        data = take_in(run)
        run.keep_settings()
        with run.journal(STAGE) as journal:
            used = facts(panel, path, data)
            works = panel.count(lambda: comparisons(run), journal)
            work = summed(works, journal.index)
            for line in [*journal.damage(), *changes(run.state(STAGE), used), work.line()]:
                progress.say(line)
            rate = measured_rate(run, panel)
            begun = {"run": str(run.path), "in_progress": True, "calls_per_s": rate}
            run.write_state(STAGE, begun | used)
            tally, cost = pay(run, panel, works, journal, progress)
            results = write_results(run, panel, journal)
        made = tally.answered + tally.faults.total()
        summary = (
            {"run": str(run.path), "calls_made": made, "calls_kept": work.kept}
            | {"calls_per_s": tally.calls_per_s or rate, "cost": cost}
            | results
            | used
        )
        run.write_state(STAGE, summary)
    if tally.stopped:
        raise _with_labels(tally.stopped, summary)
    return summary


def _with_labels(stopped: AifError, summary: dict[str, Any]) -> AifError:
    """Why it ended early; where the budget is spent, with how far it went."""
    if not isinstance(stopped, BudgetSpent):
        return stopped
    done, left = summary["labels"], summary["unfinished"]
    return BudgetSpent(
        f"{summary['run']}: {stopped}; {done:,} of {done + left:,} comparisons are labelled, "
        "the same command with a larger --budget goes on"
    )


def pay(
    run: Run, panel: Panel, works: list[tuple[Seat, Work]], journal: Journal, progress: Progress
) -> tuple[Tally, float | None]:
    """Ask what is missing, one judge after the other; what came of it, and its price in dollars.

    Under a budget the comparisons are gone through in slices, each by all judges before the next,
    so that what has been paid for when it is spent makes whole labels.
    """
    tally, costs = Tally(), []
    total = works[0][1].comparisons
    in_turns = len(panel.seats) > 1 or panel.escalates
    limited = run.settings.label.budget or run.settings.pipeline.budget
    size = max(SLICE, ceil(total / SLICES)) if limited and in_turns else max(1, total)
    for start in range(0, total, size):
        rows = partial(_slice, run, start, start + size)
        for seat, missing in turns(
            panel, works if size >= total else panel.count(rows, journal), rows, journal
        ):
            meter = Meter.of(run, STAGE, seat.judge.model)
            tally.add(ask(run, seat, missing, rows(), journal, progress, meter))
            costs += [] if meter.cost is None else [meter.cost]
            if tally.stopped:
                return tally, sum(costs) if costs else None
    return tally, sum(costs) if costs else None


def _slice(run: Run, start: int, stop: int) -> Iterator[Comparison]:
    return islice(comparisons(run), start, stop)


def measured_rate(run: Run, panel: Panel) -> float | None:
    """Calls a second in the last labelling by these judges that made any."""
    last, now = run.state(STAGE), facts(panel, Path(), {})
    same = all(last.get(key) == now.get(key) for key in ("judge", "panel"))
    return last.get("calls_per_s") if same else None


def known_to(run: Run, model: LLMSettings) -> tuple[str, ...]:
    """A model's control tokens. What is wrong with one is told now, before any is asked."""
    Meter.of(run, STAGE, model)
    with open_llm(model) as llm:
        return llm.control_tokens


def ask(
    run: Run,
    seat: Seat,
    missing: set[bytes],
    rows: Iterator[Comparison],
    journal: Journal,
    progress: Progress,
    meter: Meter,
) -> Tally:
    """Have one judge make these calls; its model is in memory for them and no longer."""
    judge = seat.judge
    several = bool(run.settings.panel)
    progress.start(f"label, {seat.name}" if several else "label", len(missing))
    with open_llm(judge.model) as llm:
        asks = asks_for(judge, rows, missing)
        tally = ask_all(llm, asks, journal, judge.journal_row, progress, meter)
    progress.finish()
    if several and isinstance(tally.stopped, JudgeStopped):
        tally.stopped = JudgeStopped(f"{seat.name}: {tally.stopped}")
    return tally


def take_in(run: Run) -> dict[str, Any]:
    """Turn `label.pairs` into comparisons.jsonl and human.jsonl, once all of it has been checked.

    Without `label.pairs` the comparisons that an earlier stage left are taken.
    """
    source = run.settings.label.pairs
    if source is None:
        return {"pairs": str(own_comparisons(run))}
    choices: list[HumanChoice] = []
    rows = 0
    digest = hashlib.sha256()

    def fresh() -> Iterator[Comparison]:
        nonlocal rows
        for pair, is_new in unique(islice(read_pairs(source), run.settings.label.limit)):
            rows += 1
            if pair.human:
                choices.append(pair.human)
            if is_new:
                digest.update(pair.comparison.id.encode("ascii"))
                yield pair.comparison

    distinct = run.write("comparisons.jsonl", fresh())
    run.write("human.jsonl", choices)
    if not distinct:
        raise InputError(source, "", got="no pairs at all", expected="at least one")
    return {
        "pairs": source,
        "rows": rows,
        "repeated_rows": rows - distinct,
        "digest": digest.hexdigest(),
    }


def own_comparisons(run: Run) -> Path:
    """The file of comparisons that an earlier stage left; InputError where there is none."""
    path = run.file("comparisons.jsonl")
    if not path.exists():
        raise InputError("label", "pairs", got="nothing", expected="--pairs FILE")
    return path


def comparisons(run: Run) -> Iterator[Comparison]:
    """What is to be judged, a row at a time."""
    return islice(run.read("comparisons.jsonl", Comparison), run.settings.label.limit)


def write_results(run: Run, panel: Panel, journal: Journal) -> dict[str, Any]:
    """Make verdicts.jsonl and labels.jsonl again from the journal; returns what they hold.

    A comparison with a call that was never made has no label row yet.
    """
    saving = Saving(panel)
    by_judge: defaultdict[str, Counter[str]] = defaultdict(Counter)
    totals: Counter[str] = Counter()
    faults = Faults()
    null_labels: Counter[str] = Counter()
    paid = Paid()
    with (
        jsonl.replacing(run.file("verdicts.jsonl")) as verdict_file,
        jsonl.replacing(run.file("labels.jsonl")) as label_file,
    ):
        for comparison in comparisons(run):
            verdicts, found = panel.judged(comparison, journal)
            for verdict, row in verdicts:
                totals["hard_verdicts"] += row["logprobs"] is None and verdict.fault is None
                faults.add(row)
                paid.add(verdict)
                verdict_file.write(jsonl.dumps(as_row(verdict)) + "\n")
            if found is None:
                totals["unfinished"] += 1
                continue
            null_labels.update([found.fault] if found.fault else [])
            for name, p_first in found.by_judge.items():
                by_judge[name].update(labels=1, null=p_first is None)
            if panel.escalates:
                saving.add(comparison, verdicts)
            totals["labels"] += 1
            totals["first_wins"] += (found.p_first or 0) > 0.5
            label_file.write(jsonl.dumps(as_row(found)) + "\n")
    return {
        "labels": totals["labels"],
        "labels_null": dict(null_labels),
        "unfinished": totals["unfinished"],
        "first_wins": totals["first_wins"],
        "verdicts": faults.calls,
        "hard_verdicts": totals["hard_verdicts"],
        "tokens": dict(paid.tokens),
        **({"judges": {n: dict(c) for n, c in by_judge.items()}} if by_judge else {}),
        **({"escalated": saving.summary()} if panel.escalates else {}),
        **faults.summary(),
    }
