"""Hold revisions against the response they came from, and keep those that the judge prefers.

    responses.jsonl + revisions.jsonl -> (calls, journal/filter.jsonl) -> kept.jsonl

Each is a comparison like any other, under `[label]`'s constitution and by `[judge]`, so a weak
reviser cannot make the training data worse than the responses were. A revision without a label is
not kept.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from statistics import fmean
from typing import Any

from aif.errors import InputError
from aif.judge.calls import asks_for, constitution_path, count, judge_of, judged
from aif.judge.judge import Judge
from aif.llm import open_llm
from aif.llm.budget import Meter
from aif.llm.dispatch import Faults, ask_all
from aif.progress import Progress
from aif.run import Run
from aif.store.journal import Journal
from aif.store.records import Comparison, Kept, Prompt, Response, Revision

STAGE = "filter"


def filter(run: Run, progress: Progress) -> dict[str, Any]:
    """Judge every revision that has no fault; returns the summary, with the kept rate by round.

    Raises Interrupted or JudgeStopped when it ended early; the files are in order all the same.
    """
    path = constitution_path(run)
    meter = Meter.of(run, STAGE, run.settings.judge)
    with open_llm(run.settings.judge) as llm, run.writing():
        judge = judge_of(run, path, llm.control_tokens)
        pairs = list(revised_pairs(run))
        comparisons = [comparison for _, comparison in pairs]
        run.keep_settings()
        with run.journal(STAGE) as journal:
            work = count(judge.cells, comparisons, journal.index)
            for line in [*journal.damage(), work.line()]:
                progress.say(line)
            progress.start(STAGE, len(work.missing))
            asks = asks_for(judge, comparisons, work.missing)
            tally = ask_all(llm, asks, journal, judge.journal_row, progress, meter)
            progress.finish()
            faults = Faults()
            rows = list(kept(run, judge, journal, pairs, faults))
        run.write("kept.jsonl", rows)
        summary = {
            "run": str(run.path),
            "calls_made": tally.answered + tally.faults.total(),
            "calls_kept": work.kept,
            "unfinished": len(pairs) - len(rows),
        } | summarised(rows, faults)
        run.write_state(STAGE, summary)
    if tally.stopped:
        raise tally.stopped
    return summary


def revised_pairs(run: Run) -> Iterator[tuple[Revision, Comparison]]:
    """Every good revision with the comparison that puts it second to its response."""
    prompts = {prompt.id: prompt.messages for prompt in run.read("prompts.jsonl", Prompt)}
    texts = {row.id: row.text for row in run.read("responses.jsonl", Response)}
    path = run.file("revisions.jsonl")
    empty = True
    for row in run.read("revisions.jsonl", Revision):
        if row.response_id not in texts or row.prompt_id not in prompts:
            raise InputError(
                path, "response_id", got=row.response_id, expected="the id of a responses.jsonl row"
            )
        if row.revision is not None:
            empty = False
            first = texts[row.response_id] or ""
            yield row, Comparison.of(prompts[row.prompt_id], first, row.revision)
    if empty:
        raise InputError(path, "", got="no revision without a fault", expected="at least one")


def kept(
    run: Run,
    judge: Judge,
    journal: Journal,
    pairs: list[tuple[Revision, Comparison]],
    faults: Faults,
) -> Iterator[Kept]:
    """What became of each revision; one that still misses a call has no row. Counts `faults`."""
    for revision, comparison in pairs:
        verdicts, label = judged(judge, comparison, journal, run.settings.label.quorum)
        for _, row in verdicts:
            faults.add(row)
        if label is None:
            continue
        of_revision = label.swapped()
        p_revision = of_revision.p_first
        yield Kept(
            revision_id=revision.id,
            response_id=revision.response_id,
            round=revision.round,
            comparison_id=comparison.id,
            p_revision=p_revision,
            by_principle=of_revision.by_principle,
            fault=label.fault,
            kept=p_revision is not None and p_revision > run.settings.filter.threshold,
        )


def summarised(rows: list[Kept], faults: Faults) -> dict[str, Any]:
    """Kept rates, overall and by round."""
    rounds: dict[int, list[Kept]] = defaultdict(list)
    for row in rows:
        rounds[row.round].append(row)
    return {
        "revisions": len(rows),
        "kept": sum(row.kept for row in rows),
        "kept_rate": sum(row.kept for row in rows) / max(1, len(rows)),
        "by_round": {str(number): _of_round(found) for number, found in sorted(rounds.items())},
        "labels_null": dict(Counter(row.fault for row in rows if row.fault)),
        **faults.summary(),
    }


def _of_round(rows: list[Kept]) -> dict[str, Any]:
    known = [row.p_revision for row in rows if row.p_revision is not None]
    return {
        "revisions": len(rows),
        "kept_rate": sum(row.kept for row in rows) / len(rows),
        "mean_p_revision": fmean(known) if known else None,
    }
