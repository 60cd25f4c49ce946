"""The OpenAI Batch API as an LLM: half the price, within 24 hours.

    [judge]
    model = "openai-batch:gpt-4.1-mini"

Asks are handed in as files of requests, each under its key as `custom_id`; the batches are then
looked at until they end. The process may be stopped at any time: what is under way stands in a
ledger (`aif.llm.ledger`), and the next pass over the same asks comes back for it.

https://platform.openai.com/docs/guides/batch
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from aif.config.settings import LLMSettings
from aif.errors import AifError, Interrupted, JudgeStopped
from aif.llm import Answer, Ask, Caller, openai_format
from aif.llm.batch_client import BatchClient, Missing, Refused
from aif.llm.openai_api import Failure
from aif.llm.submissions import Ledger, Submission

FIRST_WAIT_S = 1.0  # between two looks; grows up to `poll_s`
GROWTH = 1.5
MOST_FAILED_LOOKS = 100  # in a row: nobody is there
ENDED = {"completed", "failed", "expired", "cancelled"}
QUEUE_FULL = "token_limit_exceeded"  # the account's batches have too many tokens under way


class BatchLLM(BatchClient):
    """The model `name` behind the Batch API of `settings.base_url`.

    It holds every ask that has no answer yet in memory.
    """

    _caller: Caller | None = None

    def attend(self, caller: Caller) -> None:
        """Told before `answer`; see `aif.llm.Lasting`."""
        self._caller, self.stopping = caller, caller.stopping

    def answer(self, asks: Iterable[Ask]) -> Iterator[Answer]:
        """One answer for every ask, as the batches end.

        A row that an expired, cancelled or failed batch has no answer to, or that the server may
        answer another time, is asked again in a new batch, in `attempts` batches at most. Raises
        Interrupted on a signal; the batches go on and the next call with these asks finds them.
        """
        if self._caller is None:
            raise AifError(f"{self._settings.model}: batches need a run folder to be kept in")
        with Ledger.open(self._caller.ledger) as ledger:
            for line in ledger.damage():
                self._caller.say(line)
            try:
                yield from _Pass(self, ledger, self._caller, self._settings).answers(asks)
            except Interrupted:
                raise Interrupted(self._left_at_the_server(ledger)) from None

    def _left_at_the_server(self, ledger: Ledger) -> str:
        left = ledger.under_way()
        if not left:
            return "interrupted; the same command resumes"
        n = sum(len(submission.left()) for submission in left)
        return (
            f"interrupted; {n:,} requests in batches go on at {self._address.shown}; "
            "the same command comes back for them, `aif batches RUN --cancel` gives them up"
        )


class _Pass:
    """One answering of asks: hands in, waits, takes back, and asks again what came to nothing."""

    def __init__(self, llm: BatchLLM, ledger: Ledger, caller: Caller, settings: LLMSettings):
        self._llm = llm
        self._ledger = ledger
        self._caller = caller
        self._settings = settings
        self._wanted: dict[str, Ask] = {}
        self._open: list[Submission] = []
        self._tries: Counter[str] = Counter()
        self._why: dict[str, Failure] = {}
        self._queue_full = ""

    def answers(self, asks: Iterable[Ask]) -> Iterator[Answer]:
        """Every ask is in the ledger or handed in; all batches end; then the rest once more."""
        self._take_in(asks)
        while self._wanted:
            before, self._queue_full = len(self._wanted), ""
            yield from self._until_all_end()
            for key in [key for key in self._wanted if self._tries[key] >= self._settings.attempts]:
                why = self._why[key]
                del self._wanted[key]
                tries = f" ({self._tries[key]} batches)"
                yield Answer(key, fault=why.fault, detail=why.detail + tries)
            if self._queue_full and len(self._wanted) == before:
                raise JudgeStopped(f"{self._queue_full}; the same command asks again")
            self._hand_in(list(self._wanted.values()))

    def _take_in(self, asks: Iterable[Ask]) -> None:
        """Hand in what no batch that is under way has."""
        held = {
            key: submission
            for submission in self._ledger.under_way()
            if submission.model == self._settings.model
            for key in submission.left()
        }
        found: dict[str, Submission] = {}

        def fresh() -> Iterator[Ask]:
            for ask in asks:
                self._wanted[ask.key] = ask
                if ask.key in held:
                    found[held[ask.key].tag] = held[ask.key]
                else:
                    yield ask

        self._hand_in(fresh())
        lost = {tag for tag, submission in found.items() if submission.batch is None}
        known = self._llm.find(lost) if lost else {}
        for submission in found.values():
            if submission.tag in lost:
                self._create(submission, known.get(submission.tag))
            self._caller.say(
                f"{submission.batch}: handed in before, {len(submission.left()):,} requests"
            )
        self._open += found.values()

    def _hand_in(self, asks: Iterable[Ask]) -> None:
        for file in self._llm.requests(asks):
            self._llm.sleep(0)  # a signal may have cut the asks short
            uploaded = self._llm.upload(bytes(file.content))
            model = self._settings.model
            submission = self._ledger.plan(model, file.endpoint, uploaded, file.keys)
            self._create(submission)
            self._caller.say(f"{submission.batch}: {len(file.keys):,} requests handed in")
            self._open.append(submission)

    def _create(self, submission: Submission, batch: str | None = None) -> None:
        try:
            batch = batch or self._llm.create(submission)
        except Refused:
            self._ledger.told(submission, submission.keys)
            raise
        self._ledger.created(submission, batch)

    def _until_all_end(self) -> Iterator[Answer]:
        """Look, wait, look again."""
        wait_s, failed = FIRST_WAIT_S, 0
        while self._open:
            for submission in list(self._open):
                seen = self._look(submission)
                if isinstance(seen, Failure):
                    failed += 1
                    if failed >= MOST_FAILED_LOOKS:
                        raise self._llm.stopped("it is silent; the batches go on", seen.detail)
                    break
                failed = 0
                if seen.get("status") in ENDED:
                    self._open.remove(submission)
                    yield from self._taken_back(submission, seen)
            if self._open:
                self._llm.sleep(min(wait_s, self._settings.poll_s))
                wait_s *= GROWTH

    def _look(self, submission: Submission) -> dict[str, Any] | Failure:
        try:
            seen = self._llm.look_once(submission)
        except Missing as error:
            raise JudgeStopped(
                f"{error}: {submission.batch} is in {self._caller.ledger}; was it another key? "
                "Without that file its requests are made anew"
            ) from None
        if not isinstance(seen, Failure) and seen.get("status") != submission.status:
            submission.status = openai_format.plain(str(seen.get("status")), 40)
            self._caller.say(f"{submission.batch}: {submission.status}")
        return seen

    def _taken_back(self, submission: Submission, seen: dict[str, Any]) -> Iterator[Answer]:
        """The answers of a batch that has ended; afterwards the ledger is done with them."""
        rows = self._rows(submission, seen)
        mine = [key for key in submission.left() if key in self._wanted]
        found: list[Answer] = []
        stop: JudgeStopped | None = None
        for key in mine:
            try:
                outcome = self._outcome(key, rows, submission, seen)
            except JudgeStopped as error:  # after what else this batch has
                stop = stop or error
                continue
            if isinstance(outcome, Answer):
                found.append(outcome)
            elif outcome is not None:
                self._tries[key] += 1
                self._why[key] = outcome
        for answer in found:
            del self._wanted[answer.key]
            yield answer
        self._caller.commit()
        self._ledger.told(submission, mine)
        if stop is not None:
            raise stop

    def _rows(self, submission: Submission, seen: dict[str, Any]) -> dict[str, bytes]:
        """The lines of both files by key. Each key counts once, and only where it was asked."""
        keys = set(submission.keys)
        rows: dict[str, bytes] = {}
        ignored: Counter[str] = Counter()
        for name in ("output_file_id", "error_file_id"):
            file = seen.get(name)
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
            self._caller.say(f"{submission.batch}: passed over: {kinds}")
        return rows

    def _outcome(
        self, key: str, rows: dict[str, bytes], submission: Submission, seen: dict[str, Any]
    ) -> Answer | Failure | None:
        """What a batch that has ended says about an ask; None: it did not get its turn."""
        if key in rows:
            return self._llm.outcome(self._wanted[key], rows[key])
        status = seen["status"]
        if status == "failed" and (errors := self._llm.errors(seen)):
            codes, said = errors
            stopped = self._llm.stopped(f"{submission.batch} was refused", said)
            if codes != {QUEUE_FULL}:
                raise stopped
            self._queue_full = str(stopped)
            return None
        fault = "timeout" if status == "expired" else "backend"
        return Failure(fault, f"the batch ended as {status} without it", {})
