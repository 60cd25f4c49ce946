"""The OpenAI Batch API as an LLM: half the price, within 24 hours.

    [judge]
    model = "openai-batch:gpt-4.1-mini"

Asks are sent as files of requests, each with its key as `custom_id`; then the batches are polled
until they end. The process may be stopped at any time: the requests under way stand in a log
(`aif.llm.submissions`), and the next pass over the same asks comes back for them.

https://platform.openai.com/docs/guides/batch
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from aif.config.settings import LLMSettings
from aif.errors import AifError, Interrupted, JudgeStopped
from aif.llm import Answer, Ask, openai_format
from aif.llm.batch_client import BatchClient, BatchRefused
from aif.llm.openai_api import Failure, NotFound
from aif.llm.submissions import Session, Submission, SubmissionLog

FIRST_WAIT_S = 1.0  # between two looks; grows up to `poll_s`
GROWTH = 1.5
MOST_FAILED_LOOKS = 100  # in a row: nobody is there
ENDED = {"completed", "failed", "expired", "cancelled"}
QUEUE_FULL = "token_limit_exceeded"  # the account's batches have too many tokens under way


class BatchLLM(BatchClient):
    """The model `name` behind the Batch API of `settings.base_url`.

    It holds every ask that has no answer yet in memory.
    """

    _session: Session | None = None

    def resume_with(self, session: Session) -> None:
        """Called before `answer`; see `aif.llm.submissions.ResumableLLM`."""
        self._session, self.stopping = session, session.stopping

    def answer(self, asks: Iterable[Ask]) -> Iterator[Answer]:
        """One answer for every ask, as the batches end.

        A request without an answer (its batch expired, was cancelled or failed, or the server asks
        for a retry) goes into a new batch, into `attempts` batches at most. Raises Interrupted on
        a signal; the batches go on and the next call with these asks finds them.
        """
        if self._session is None:
            raise AifError(f"{self._settings.model}: batches need a run folder for their log")
        with SubmissionLog.open(self._session.log) as log:
            for line in log.damage():
                self._session.say(line)
            try:
                yield from _Pass(self, log, self._session, self._settings).answers(asks)
            except Interrupted:
                raise Interrupted(self._left_at_the_server(log)) from None

    def _left_at_the_server(self, log: SubmissionLog) -> str:
        left = log.under_way()
        if not left:
            return "interrupted; the same command resumes"
        n = sum(len(submission.left()) for submission in left)
        return (
            f"interrupted; {n:,} requests in batches go on at {self._address.shown}; "
            "the same command comes back for them, `aif batches RUN --cancel` gives them up"
        )


class _Pass:
    """One pass over asks: submits, waits, takes answers back, and submits again what has none."""

    def __init__(self, llm: BatchLLM, log: SubmissionLog, session: Session, settings: LLMSettings):
        self._llm = llm
        self._log = log
        self._session = session
        self._settings = settings
        self._unanswered: dict[str, Ask] = {}
        self._open: list[Submission] = []
        self._failures: dict[str, list[Failure]] = defaultdict(list)  # one for each try of a key
        self._queue_full = ""

    def answers(self, asks: Iterable[Ask]) -> Iterator[Answer]:
        """Submit every ask that is in no batch, wait until all batches end, submit the rest."""
        self._take_in(asks)
        while self._unanswered:
            before, self._queue_full = len(self._unanswered), ""
            yield from self._until_all_end()
            for key, failures in self._failures.items():
                if key in self._unanswered and len(failures) >= self._settings.attempts:
                    del self._unanswered[key]
                    detail = f"{failures[-1].detail} ({len(failures)} batches)"
                    yield Answer(key, fault=failures[-1].fault, detail=detail)
            if self._queue_full and len(self._unanswered) == before:
                raise JudgeStopped(f"{self._queue_full}; the same command asks again")
            self._submit(list(self._unanswered.values()))

    def _take_in(self, asks: Iterable[Ask]) -> None:
        """Submit the asks that no batch under way has, and wait for the other batches too."""
        in_batch = {
            key: submission
            for submission in self._log.under_way()
            if submission.model == self._settings.model
            for key in submission.left()
        }
        earlier: dict[str, Submission] = {}

        def fresh() -> Iterator[Ask]:
            for ask in asks:
                self._unanswered[ask.key] = ask
                if ask.key in in_batch:
                    earlier[in_batch[ask.key].tag] = in_batch[ask.key]
                else:
                    yield ask

        self._submit(fresh())
        lost = {tag for tag, submission in earlier.items() if submission.batch is None}
        batch_of = self._llm.find(lost) if lost else {}
        for submission in earlier.values():
            if submission.tag in lost:
                self._create(submission, batch_of.get(submission.tag))
            self._session.say(
                f"{submission.batch}: handed in before, {len(submission.left()):,} requests"
            )
        self._open += earlier.values()

    def _submit(self, asks: Iterable[Ask]) -> None:
        for file in self._llm.requests(asks):
            self._llm.sleep(0)  # a signal may have cut the asks short
            uploaded = self._llm.upload(bytes(file.content))
            model = self._settings.model
            submission = self._log.plan(model, file.endpoint, uploaded, file.keys)
            self._create(submission)
            self._session.say(f"{submission.batch}: {len(file.keys):,} requests handed in")
            self._open.append(submission)

    def _create(self, submission: Submission, batch: str | None = None) -> None:
        try:
            batch = batch or self._llm.create(submission)
        except BatchRefused:
            self._log.finish(submission, submission.keys)
            raise
        self._log.created(submission, batch)

    def _until_all_end(self) -> Iterator[Answer]:
        """Poll the batches; as each ends, yield its answers."""
        wait_s, failed = FIRST_WAIT_S, 0
        while self._open:
            for submission in list(self._open):
                batch = self._look(submission)
                if isinstance(batch, Failure):
                    failed += 1
                    if failed >= MOST_FAILED_LOOKS:
                        raise self._llm.stopped("it is silent; the batches go on", batch.detail)
                    break
                failed = 0
                if batch.get("status") in ENDED:
                    self._open.remove(submission)
                    yield from self._take_back(submission, batch)
            if self._open:
                self._llm.sleep(min(wait_s, self._settings.poll_s))
                wait_s *= GROWTH

    def _look(self, submission: Submission) -> dict[str, Any] | Failure:
        try:
            batch = self._llm.look_once(submission)
        except NotFound as error:
            raise JudgeStopped(
                f"{error}: {submission.batch} is in {self._session.log}; was it another key? "
                "Without that file its requests are made anew"
            ) from None
        if not isinstance(batch, Failure) and batch.get("status") != submission.status:
            submission.status = openai_format.plain(str(batch.get("status")), 40)
            self._session.say(f"{submission.batch}: {submission.status}")
        return batch

    def _take_back(self, submission: Submission, batch: dict[str, Any]) -> Iterator[Answer]:
        """The answers of a batch that has ended; once they are durable, the log has them done."""
        rows = self._rows(submission, batch)
        keys = [key for key in submission.left() if key in self._unanswered]
        answers: list[Answer] = []
        stop: JudgeStopped | None = None
        for key in keys:
            try:
                outcome = self._outcome(key, rows, submission, batch)
            except JudgeStopped as error:  # raised after the other answers of this batch
                stop = stop or error
                continue
            if isinstance(outcome, Answer):
                answers.append(outcome)
            elif outcome is not None:
                self._failures[key].append(outcome)
        for answer in answers:
            del self._unanswered[answer.key]
            yield answer
        self._session.commit()
        self._log.finish(submission, keys)
        if stop is not None:
            raise stop

    def _rows(self, submission: Submission, batch: dict[str, Any]) -> dict[str, bytes]:
        """The lines of both files by key: only keys of the submission, and each only once."""
        keys = set(submission.keys)
        rows: dict[str, bytes] = {}
        ignored: Counter[str] = Counter()
        for name in ("output_file_id", "error_file_id"):
            file = batch.get(name)
            content = self._llm.download(file) if isinstance(file, str) and file else b""
            ignored["files gone"] += bool(file) and not content
            for line in filter(bytes.strip, content.split(b"\n")):
                try:
                    key = openai_format.parse(line).get("custom_id")
                except openai_format.NotACompletion:
                    ignored["rows unreadable"] += 1
                    continue
                if not isinstance(key, str) or key not in keys:
                    ignored["rows unknown"] += 1
                elif key in rows:
                    ignored["rows repeated"] += 1
                else:
                    rows[key] = line
        if +ignored:
            kinds = ", ".join(f"{n:,} {kind}" for kind, n in (+ignored).items())
            self._session.say(f"{submission.batch}: passed over: {kinds}")
        return rows

    def _outcome(
        self, key: str, rows: dict[str, bytes], submission: Submission, batch: dict[str, Any]
    ) -> Answer | Failure | None:
        """The outcome of one ask in a batch that has ended; None: its turn never came."""
        if key in rows:
            return self._llm.outcome(self._unanswered[key], rows[key])
        status = batch["status"]
        if status == "failed":
            codes, message = self._llm.errors(batch)
            stopped = self._llm.stopped(f"{submission.batch} was refused", message)
            if codes != {QUEUE_FULL}:
                raise stopped
            self._queue_full = str(stopped)
            return None
        fault = "timeout" if status == "expired" else "backend"
        return Failure(fault, f"the batch ended as {status} without it", {})
