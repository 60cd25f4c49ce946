"""A live judge: its grades are the reward while a policy learns, and no grade is paid for twice.

    prompts, responses -> (calls, journal/ppo.jsonl) -> the grade of each response, in log-odds

Direct RLAIF (Lee et al. 2023, 2309.00267): there is no reward model between the judge and the
policy. The protocol is pointwise or rating, which grade a response alone. A grade has the same id
as in a labelling, so the answers of `aif label` are read from its journal.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from typing import Any

from aif.errors import InputError
from aif.judge.aggregate import has_quorum
from aif.judge.judge import JudgeCall, protocol_of
from aif.judge.panel import judge_of
from aif.judge.protocols import PROTOCOLS
from aif.llm import LLM, Answer, open_llm
from aif.llm.budget import Meter
from aif.llm.dispatch import Faults, ask_all
from aif.progress import Progress
from aif.run import Run
from aif.stats.odds import log_odds
from aif.store.journal import Journal, Reader
from aif.store.records import Comparison, Message, content_id

STAGE = "ppo"
LABELS = "label"  # the stage whose answers are used too
NOBODY = ""  # the other response of a comparison: a grade does not depend on it


class LiveJudge(AbstractContextManager["LiveJudge"]):
    """A run's judge as a reward: `judge(prompts, responses)` returns their grades.

    Raises InputError for wrong settings, constitution or template. The journals open at the first
    call, the model once there is something to ask. From the first call to `close` the caller holds
    the run (`Run.writing`).

    `faults` counts the calls of this process and their faults; the answers are in the journal of
    `stage`.
    """

    def __init__(self, run: Run, stage: str = STAGE):
        _require_grades(run)
        self.faults = Faults()
        self._run, self._stage = run, stage
        self._judge = judge_of(run.settings)
        self._meter = Meter.of(run, stage, run.settings.judge)
        self._opened = ExitStack()
        trial = Comparison.of([{"role": "user", "content": "?"}], "?", NOBODY)
        for call in self._calls_for(trial):  # a wrong template fails now, not after a rollout
            self._judge.ask(call, trial)

    @property
    def calls(self) -> int:
        """Calls made in this process; a grade from a journal is none."""
        return self.faults.calls

    @property
    def identity(self) -> str:
        """A digest of what a grade depends on besides the response."""
        return content_id("grades", *sorted(self._judge.question_ids.values()))

    def __call__(
        self, prompts: Sequence[list[Message]], responses: Sequence[str]
    ) -> list[float | None]:
        """The grades of responses to prompts, both of length N, in their order.

        A grade is the weighted mean of the principles' log-odds, in +-30 (of yes, or of a rating as
        a share of its scale; the `combine` rules are for comparisons). It is None for a blank
        response, and if the principles with an answer have less than `label.quorum` of the total
        weight; the next call asks again after a fault.

        Raises Interrupted or JudgeStopped when it ended early; every answer so far is kept.
        """
        rows = [
            Comparison.of(prompt, response, NOBODY)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        self._ask_missing(rows)
        return [self._grade(row) for row in rows]

    def close(self) -> None:
        """Free the model and close the journals; another call opens them again."""
        self.__exit__(None, None, None)

    def __exit__(self, *error: Any) -> None:
        for name in ("_llm", "_journal", "_labels_journal"):
            vars(self).pop(name, None)
        self._opened.__exit__(*error)

    @cached_property
    def _llm(self) -> LLM:
        return self._opened.enter_context(open_llm(self._run.settings.judge))

    @cached_property
    def _journal(self) -> Journal:
        return self._opened.enter_context(self._run.journal(self._stage))

    @cached_property
    def _labels_journal(self) -> Reader:
        return self._opened.enter_context(self._run.answers(LABELS, missing_ok=True))

    def _calls_for(self, row: Comparison) -> list[JudgeCall]:
        """The calls that grade a response: one per principle, and none for a blank text."""
        return self._judge.calls_for(row, "a") if row.first.strip() else []

    def _ask_missing(self, rows: Sequence[Comparison]) -> None:
        """Make the calls that have an answer in neither journal, each once."""
        digests = {call.digest for row in rows for call in self._calls_for(row)}
        for journal in (self._journal, self._labels_journal):
            digests -= journal.index.answered.keys()
        if not digests:
            return
        asks = self._judge.asks(rows, digests, self._llm.control_tokens)
        quiet = Progress(quiet=True)  # the terminal shows the progress of the training
        tally = ask_all(self._llm, asks, self._journal, self._journal_row, quiet, self._meter)
        if tally.stopped:
            raise tally.stopped

    def _journal_row(self, answer: Answer) -> dict[str, Any]:
        row = self._judge.journal_row(answer)
        self.faults.add(row)
        return row

    def _grade(self, row: Comparison) -> float | None:
        total = answered = graded = 0.0
        for call in self._calls_for(row):
            weight = call.principle.weight
            total += weight
            is_labelled = call.digest in self._labels_journal.index.answered
            journal = self._labels_journal if is_labelled else self._journal
            for verdict, _ in self._judge.verdicts([call], row, journal):
                if verdict.p_first is not None:
                    answered += weight
                    graded += weight * log_odds(verdict.p_first)
        enough = has_quorum(answered, total, self._run.settings.label.quorum)
        return graded / answered if enough else None


def _require_grades(run: Run) -> None:
    if PROTOCOLS[protocol_of(run.settings.judge, run.settings.label)].compares:
        raise InputError(
            "label",
            "protocol",
            got=repr(run.settings.label.protocol),
            expected="'pointwise' or 'rating', as a live judge grades responses by themselves",
        )
