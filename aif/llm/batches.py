"""The batches that a run has at a Batch API: how they stand, and giving them up."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from aif.config.settings import LLMSettings
from aif.llm.submissions import Ledger, Submission
from aif.run import Run
from aif.store.journal import Reader

CANCELLED = {"cancelling", "cancelled"}


def batches(run: Run, cancel: bool) -> dict[str, Any]:
    """Every batch with requests whose answers are not in; with `cancel` the server stops each.

    What a cancelled batch has answered is taken by the next command that wants it. Raises RunBusy
    where a batch is to be cancelled that another process waits for.
    """
    found = []
    with run.writing() if cancel else nullcontext():
        for path in sorted(run.path.glob("**/journal/*.batches.jsonl")):
            with Reader.reading(path) as journal:
                under_way = Ledger(journal).under_way()
            for submission in under_way:
                stage = str(path.relative_to(run.path)).removesuffix(".batches.jsonl")
                found.append({"stage": stage} | _state(run, submission, cancel))
    return {"run": str(run.path), "batches": found}


def _state(run: Run, submission: Submission, cancel: bool) -> dict[str, Any]:
    from aif.llm.batch_api import ENDED, BatchLLM

    with BatchLLM(_settings(run, submission), "") as llm:
        if submission.batch is None:
            submission.batch = llm.find({submission.tag}).get(submission.tag)
        seen = {} if submission.batch is None else llm.look(submission)
        if cancel and seen and seen["status"] not in ENDED | CANCELLED:
            seen = llm.cancel(submission)
    return {
        "batch": submission.batch,
        "model": submission.model,
        "requests": len(submission.left()),
        "status": seen.get("status", "never created"),
    }


def _settings(run: Run, submission: Submission) -> LLMSettings:
    """Those of the judge, policy or reviser that made it; else the judge's, with its model."""
    judges = (run.settings.judge, *run.settings.panel)
    own = (*judges, run.settings.policy, run.settings.reviser)
    named = [table for table in own if table and table.model == submission.model]
    return (*named, run.settings.judge.model_copy(update={"model": submission.model}))[0]
