"""The batches that a run has at a Batch API: their state, and how to cancel them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from aif.config.settings import LLMSettings
from aif.llm.submissions import Submission, SubmissionLog
from aif.run import Run
from aif.store.journal import Reader

CANCELLED = {"cancelling", "cancelled"}


def list_batches(run: Run, cancel: bool) -> dict[str, Any]:
    """Every batch with requests that still want an answer; with `cancel` the server stops each.

    The next command that wants them takes the answers that a cancelled batch has. Raises RunBusy
    if a batch is to be cancelled while another process waits for it.
    """
    rows = []
    with run.writing() if cancel else nullcontext():
        for path in sorted(run.path.glob("**/journal/*.batches.jsonl")):
            with Reader.reading(path) as journal:
                under_way = SubmissionLog(journal).under_way()
            for submission in under_way:
                stage = str(path.relative_to(run.path)).removesuffix(".batches.jsonl")
                rows.append({"stage": stage} | _state(run, submission, cancel))
    return {"run": str(run.path), "batches": rows}


def _state(run: Run, submission: Submission, cancel: bool) -> dict[str, Any]:
    from aif.llm.batch_api import ENDED, BatchLLM

    with BatchLLM(_settings(run, submission), "") as llm:
        if submission.batch is None:
            submission.batch = llm.find({submission.tag}).get(submission.tag)
        batch = {} if submission.batch is None else llm.look(submission)
        if cancel and batch and batch["status"] not in ENDED | CANCELLED:
            batch = llm.cancel(submission)
    return {
        "batch": submission.batch,
        "model": submission.model,
        "requests": len(submission.left()),
        "status": batch.get("status", "never created"),
    }


def _settings(run: Run, submission: Submission) -> LLMSettings:
    """The table of the model that made it; if there is none, the judge's with that model."""
    judges = (run.settings.judge, *run.settings.panel)
    for table in (*judges, run.settings.policy, run.settings.reviser):
        if table and table.model == submission.model:
            return table
    return run.settings.judge.model_copy(update={"model": submission.model})
