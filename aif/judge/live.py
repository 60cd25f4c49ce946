"""A live judge: its grades are the reward while a policy learns, and none is paid for twice.

    prompts, responses -> (calls, journal/ppo.jsonl) -> the grade of each response, in log-odds

Direct RLAIF (Lee et al. 2023, 2309.00267): no reward model stands between the judge and the policy.
A response is graded by itself, so the protocol is pointwise or rating, and a grade has the same id
here as in a labelling: what `aif label` paid for is read from its journal.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from typing import Any

from aif.errors import InputError
from aif.judge.calls import asks_for, constitution_path, judge_of
from aif.judge.judge import Cell, Judge, resolved
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
LABELS = "label"  # the stage whose answers are served, too
NOBODY = ""  # what a response is compared with: its grade does not depend on it


class LiveJudge(AbstractContextManager["LiveJudge"]):
    """A run's judge as a reward: `judge(prompts, responses)` are their grades.

    Raises InputError where the settings, the constitution or the template are not what they should
    be. Nothing is opened before the first call of it, and no model before there is something to
    ask. From that first call to `close` the caller holds the run (`Run.writing`).

    `faults` counts what was asked in this process and what came to nothing; the answers are in the
    journal of `stage`.
    """

    def __init__(self, run: Run, stage: str = STAGE):
        _require_grades(run)
        self.faults = Faults()
        self._run, self._stage = run, stage
        self._judge = judge_of(run, constitution_path(run))
        self._meter = Meter.of(run, stage, run.settings.judge)
        self._llm: LLM | None = None
        self._opened = ExitStack()
        trial = Comparison.of([{"role": "user", "content": "?"}], "?", NOBODY)
        for cell in self._cells(trial):  # a bad template fails now, not after the first rollout
            self._judge.ask(cell, trial)

    @property
    def calls(self) -> int:
        """Calls made in this process; grades that a journal had are none."""
        return self.faults.calls

    @property
    def identity(self) -> str:
        """A digest of what a grade depends on besides the response."""
        return content_id("grades", *sorted(self._judge.question_ids.values()))

    def __call__(
        self, prompts: Sequence[list[Message]], responses: Sequence[str]
    ) -> list[float | None]:
        """The grades of responses to prompts [N], in their order.

        A grade is the mean of the principles' log-odds by weight, in +-30 (of yes, or of a rating
        as a share of its scale; `combine` and its rules are for comparisons). It is None for a
        response that is blank, and where the principles with an answer hold less than
        `label.quorum` of the weight of those asked; what failed is asked again by the next call.

        Raises Interrupted or JudgeStopped when it ended early; every answer so far is kept.
        """
        rows = [
            Comparison.of(prompt, response, NOBODY)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        self._pay(rows)
        return [self._grade(row) for row in rows]

    def close(self) -> None:
        """Free the model and close the journal; another call would open them again."""
        self.__exit__(None, None, None)

    def __exit__(self, *error: Any) -> None:
        self._llm = None
        for name in ("_journal", "_labelled"):
            vars(self).pop(name, None)
        self._opened.__exit__(*error)

    @cached_property
    def _journal(self) -> Journal:
        return self._opened.enter_context(self._run.journal(self._stage))

    @cached_property
    def _labelled(self) -> Reader:
        path = self._run.file("journal") / f"{LABELS}.jsonl"
        return self._opened.enter_context(Reader.reading(path, missing_ok=True))

    def _model(self) -> LLM:
        """The model. Once it is open, the judge knows its control tokens."""
        if self._llm is None:
            settings, constitution = self._run.settings, self._judge.constitution
            self._llm = self._opened.enter_context(open_llm(settings.judge))
            tokens = self._llm.control_tokens
            self._judge = Judge(constitution, settings.judge, settings.label, tokens)
        return self._llm

    def _cells(self, row: Comparison) -> list[Cell]:
        """The calls that grade a response: one a principle, and none for a blank text."""
        if not row.first.strip():
            return []
        return [cell for cell in self._judge.cells(row) if cell.order == "a"]

    def _pay(self, rows: Sequence[Comparison]) -> None:
        """Ask what neither journal has an answer to, each once."""
        wanted = {bytes.fromhex(cell.id) for row in rows for cell in self._cells(row)}
        missing = (
            wanted - self._journal.index.answered.keys() - self._labelled.index.answered.keys()
        )
        if not missing:
            return
        llm = self._model()
        asks = asks_for(self._judge, rows, missing)
        # Quiet: the progress on the terminal is that of the training.
        quiet = Progress(quiet=True)
        tally = ask_all(llm, asks, self._journal, self._counted, quiet, self._meter)
        if tally.stopped:
            raise tally.stopped

    def _counted(self, answer: Answer) -> dict[str, Any]:
        row = self._judge.journal_row(answer)
        self.faults.add(row)
        return row

    def _grade(self, row: Comparison) -> float | None:
        total = held = graded = 0.0
        for cell in self._cells(row):
            weight = cell.principle.weight
            total += weight
            found = self._newest(cell)
            p_yes = None if found is None else self._judge.verdict(cell, row, found).p_first
            if p_yes is not None:
                held += weight
                graded += weight * log_odds(p_yes)
        enough = self._run.settings.label.quorum * total * (1 - 1e-9)  # as in `combine`
        return graded / held if held and held >= enough else None

    def _newest(self, cell: Cell) -> dict[str, Any] | None:
        """The journal row that counts for a cell, if there is any."""
        is_labelled = bytes.fromhex(cell.id) in self._labelled.index.answered
        return (self._labelled if is_labelled else self._journal).newest(cell.id)


def _require_grades(run: Run) -> None:
    protocol, _ = resolved(run.settings.judge, run.settings.label)
    if PROTOCOLS[protocol].compares:
        raise InputError(
            "label",
            "protocol",
            got=repr(run.settings.label.protocol),
            expected="'pointwise' or 'rating', as a live judge grades responses by themselves",
        )
