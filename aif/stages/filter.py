"""Compare each revision with its response, and keep the revisions that the judge prefers.

    responses.jsonl + revisions.jsonl -> (calls, journal/filter.jsonl) -> kept.jsonl

The judge is `[judge]` without the panel, with the full protocol and the constitution of `[label]`.
With this filter, a weak reviser cannot make the training data worse than the responses. A revision
without a label is not kept.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from aif.errors import InputError
from aif.judge.calls import PendingCalls, ask_missing, check_models
from aif.judge.panel import Panel, judge_of
from aif.llm.dispatch import Faults
from aif.progress import Progress
from aif.run import Run
from aif.store.journal import Reader
from aif.store.records import Comparison, Kept, Prompt, Response, Revision

STAGE = "filter"


def filter(run: Run, progress: Progress) -> dict[str, Any]:
    """Judge every revision that has no fault; returns the summary, with the kept rate by round.

    Raises Interrupted or JudgeStopped if it ended early; the files are complete for the answers so
    far.
    """
    settings = run.settings
    check_models(run, STAGE, [settings.judge])
    full = settings.label.model_copy(update={"escalate_below": None})
    panel = Panel([judge_of(settings)], full, {})
    with run.writing():
        pairs = revised_pairs(run)
        run.keep_settings()
        with run.journal(STAGE) as journal:
            rows = [comparison for _, comparison in pairs]
            pending = PendingCalls.of(panel, rows, journal)
            for line in [*journal.damage(), pending.line()]:
                progress.say(line)
            tally, _ = ask_missing(run, STAGE, panel, pending, lambda: rows, journal, progress)
            faults = Faults()
            kept = list(kept_rows(panel, journal, pairs, settings.filter.threshold, faults))
        run.write("kept.jsonl", kept)
        summary = {
            "run": str(run.path),
            "calls_made": tally.calls,
            "calls_kept": pending.kept,
            "unfinished": len(pairs) - len(kept),
        } | summarised(kept, faults)
        run.write_state(STAGE, summary)
    if tally.stopped:
        raise tally.stopped
    return summary


def revised_pairs(run: Run) -> list[tuple[Revision, Comparison]]:
    """Every revision without a fault, and its comparison with the response: the response is
    first."""
    prompts = {prompt.id: prompt.messages for prompt in run.read("prompts.jsonl", Prompt)}
    texts = {row.id: row.text for row in run.read("responses.jsonl", Response)}
    path = run.file("revisions.jsonl")
    pairs = []
    for row in run.read("revisions.jsonl", Revision):
        if row.response_id not in texts or row.prompt_id not in prompts:
            raise InputError(
                path, "response_id", got=row.response_id, expected="the id of a responses.jsonl row"
            )
        if row.revision is not None:
            first = texts[row.response_id] or ""
            pairs.append((row, Comparison.of(prompts[row.prompt_id], first, row.revision)))
    if not pairs:
        raise InputError(path, "", got="no revision without a fault", expected="at least one")
    return pairs


def kept_rows(
    panel: Panel,
    journal: Reader,
    pairs: Sequence[tuple[Revision, Comparison]],
    threshold: float,
    faults: Faults,
) -> Iterator[Kept]:
    """A row for each revision, unless one of its calls was never made. Counts `faults`."""
    for revision, comparison in pairs:
        verdicts, label = panel.judged(comparison, journal)
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
            kept=p_revision is not None and p_revision > threshold,
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
        "by_round": {str(number): _of_round(group) for number, group in sorted(rounds.items())},
        "labels_null": dict(Counter(row.fault for row in rows if row.fault)),
        **faults.summary(),
    }


def _of_round(rows: list[Kept]) -> dict[str, Any]:
    labeled = [row.p_revision for row in rows if row.p_revision is not None]
    return {
        "revisions": len(rows),
        "kept_rate": sum(row.kept for row in rows) / len(rows),
        "mean_p_revision": fmean(labeled) if labeled else None,
    }
