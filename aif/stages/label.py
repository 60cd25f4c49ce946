"""Label comparisons with a judge, or several, under a constitution.

    pairs -> comparisons.jsonl -> (calls, journal/label.jsonl) -> verdicts.jsonl + labels.jsonl

A call is made only if its id is not in the journal. So a new run, a killed run and an edited
constitution are all the same case.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from aif.data.readers import read_pairs, unique
from aif.errors import AifError, BudgetSpent, InputError
from aif.judge.calls import PendingCalls, ask_missing, check_models
from aif.judge.panel import EscalationStats, Panel, panel_of
from aif.judge.provenance import changes, facts
from aif.llm.dispatch import Faults
from aif.llm.usage import Paid
from aif.progress import Progress
from aif.run import Run
from aif.store import jsonl
from aif.store.journal import Reader
from aif.store.records import Comparison, HumanChoice, as_row

STAGE = "label"


def label(run: Run, progress: Progress) -> dict[str, Any]:
    """Label the comparisons of a run; returns the summary, which is also written to label.json.

    Raises Interrupted, JudgeStopped or BudgetSpent if it ended early; the files are complete for
    the answers so far. `dispatch.check_faults` checks the summary's share of faults.
    """
    settings = run.settings
    check_models(run, STAGE, [settings.judge, *settings.panel])
    panel = panel_of(settings)
    with run.writing():
        data = take_in(run)
        run.keep_settings()
        with run.journal(STAGE) as journal:
            used = facts(panel, settings, data)
            rows = partial(comparisons, run)
            pending = PendingCalls.of(panel, rows(), journal)
            for line in [*journal.damage(), *changes(run.state(STAGE), used), pending.line()]:
                progress.say(line)
            rate = measured_rate(run, used)
            begun = {"run": str(run.path), "in_progress": True, "calls_per_s": rate}
            run.write_state(STAGE, begun | used)
            tally, cost = ask_missing(run, STAGE, panel, pending, rows, journal, progress)
            results = write_results(run, panel, journal)
        summary = (
            {"run": str(run.path), "calls_made": tally.calls, "calls_kept": pending.kept}
            | {"calls_per_s": tally.calls_per_s or rate, "cost": cost}
            | results
            | used
        )
        run.write_state(STAGE, summary)
    if tally.stopped:
        raise _with_labels(tally.stopped, summary)
    return summary


def _with_labels(stopped: AifError, summary: dict[str, Any]) -> AifError:
    """The error that ended it early, with the number of labels if the budget is spent."""
    if not isinstance(stopped, BudgetSpent):
        return stopped
    done, left = summary["labels"], summary["unfinished"]
    return BudgetSpent(
        f"{summary['run']}: {stopped}; {done:,} of {done + left:,} comparisons are labelled, "
        "the same command with a larger --budget goes on"
    )


def measured_rate(run: Run, used: dict[str, Any]) -> float | None:
    """Calls per second of the last labelling by the same judges, if it made any call."""
    last = run.state(STAGE)
    same = all(last.get(key) == used.get(key) for key in ("judge", "panel"))
    return last.get("calls_per_s") if same else None


def take_in(run: Run) -> dict[str, Any]:
    """Read `label.pairs` into comparisons.jsonl and human.jsonl; on a wrong row both stay
    unchanged. Without `label.pairs`, use the comparisons of an earlier stage. Returns the facts.
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
    """The comparisons file of an earlier stage; InputError if there is none."""
    path = run.file("comparisons.jsonl")
    if not path.exists():
        raise InputError("label", "pairs", got="nothing", expected="--pairs FILE")
    return path


def comparisons(run: Run) -> Iterator[Comparison]:
    """The comparisons to label, one by one."""
    return islice(run.read("comparisons.jsonl", Comparison), run.settings.label.limit)


def write_results(run: Run, panel: Panel, journal: Reader) -> dict[str, Any]:
    """Write verdicts.jsonl and labels.jsonl anew from the journal; returns their counts.

    A comparison has no label row yet if one of its calls was never made.
    """
    faults, paid, escalated = Faults(), Paid(), EscalationStats(panel)
    totals: Counter[str] = Counter()
    null_labels: Counter[str] = Counter()
    by_judge: defaultdict[str, Counter[str]] = defaultdict(Counter)
    with (
        jsonl.replacing(run.file("verdicts.jsonl")) as verdict_file,
        jsonl.replacing(run.file("labels.jsonl")) as label_file,
    ):
        for comparison in comparisons(run):
            verdicts, label = panel.judged(comparison, journal)
            for verdict, row in verdicts:
                totals["hard_verdicts"] += row["logprobs"] is None and verdict.fault is None
                faults.add(row)
                paid.add(verdict)
                verdict_file.write(jsonl.dumps(as_row(verdict)) + "\n")
            if label is None:
                totals["unfinished"] += 1
                continue
            totals["labels"] += 1
            totals["first_wins"] += (label.p_first or 0) > 0.5
            null_labels.update([label.fault] if label.fault else [])
            for name, p_first in label.by_judge.items():
                by_judge[name].update(labels=1, null=p_first is None)
            if panel.escalates:
                escalated.add(comparison, verdicts)
            label_file.write(jsonl.dumps(as_row(label)) + "\n")
    return {
        "labels": totals["labels"],
        "labels_null": dict(null_labels),
        "unfinished": totals["unfinished"],
        "first_wins": totals["first_wins"],
        "verdicts": faults.calls,
        "hard_verdicts": totals["hard_verdicts"],
        "tokens": dict(paid.tokens),
        **({"judges": {n: dict(c) for n, c in by_judge.items()}} if by_judge else {}),
        **({"escalated": escalated.summary()} if panel.escalates else {}),
        **faults.summary(),
    }
