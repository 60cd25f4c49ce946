"""Requests handed to a Batch API and not yet taken back, durable across processes.

A journal (`aif.store.journal`) of three kinds of rows, each with the submission's `tag`:

    {"tag":"9f0c...","model":"openai-batch:m","endpoint":"/v1/chat/completions","file":"file-1",
     "keys":["51ab...", ...]}                 is about to be created
    {"tag":"9f0c...","batch":"batch_1"}       was created
    {"tag":"9f0c...","told":["51ab...", ...]} these answers are durable, or will never come

The first is on the disk before the request to the server, and the batch has its tag as metadata, so
a batch whose creation was never written down is found again. The log holds no API key and no URL.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from aif.store.journal import Journal
from aif.store.records import content_id


@dataclass(frozen=True, slots=True)
class Session:
    """What a `ResumableLLM` needs from the stage that asks it."""

    log: Path  # the file for its submissions, in a folder that is locked for this process
    commit: Callable[[], None]  # returns once every answer yielded so far is durable
    stopping: Callable[[], bool]  # whether a signal asks to end
    say: Callable[[str], None]  # a line for the person at the terminal


@runtime_checkable
class ResumableLLM(Protocol):
    """An LLM whose calls outlive the process that made them, so that it can come back for them."""

    def resume_with(self, session: Session) -> None:
        """Called before `answer`."""


@dataclass(slots=True)
class Submission:
    """One batch of requests."""

    tag: str
    model: str  # as settings name it
    endpoint: str
    file: str  # the uploaded requests
    keys: list[str]
    batch: str | None = None  # None: it may or may not have been created
    status: str = ""  # as last seen
    done: set[str] = field(default_factory=set)  # keys with a durable answer, or given up

    def left(self) -> list[str]:
        """The keys that are not done."""
        return [key for key in self.keys if key not in self.done]


class SubmissionLog:
    """The submissions of one stage. Build it with `SubmissionLog.open`, use it in a `with`."""

    def __init__(self, journal: Journal):
        self._journal = journal

    @classmethod
    def open(cls, path: Path) -> SubmissionLog:
        """Read the file and be ready to append; one process at a time."""
        return cls(Journal.open(path))

    def damage(self) -> list[str]:
        """A line for the person about every row that cannot be read."""
        return self._journal.damage()

    def under_way(self) -> list[Submission]:
        """The submissions with keys that are not done, oldest first."""
        by_tag: dict[str, Submission] = {}
        for key in self._journal.index.answered:
            row = self._journal.newest(key.hex()) or {}
            if "keys" in row:
                names = ("tag", "model", "endpoint", "file", "keys")
                by_tag[row["tag"]] = Submission(*(row[name] for name in names))
            elif submission := by_tag.get(row["tag"]):  # else its first row is damaged
                submission.batch = row.get("batch", submission.batch)
                submission.done.update(row.get("told", ()))
        return [submission for submission in by_tag.values() if submission.left()]

    def plan(self, model: str, endpoint: str, file: str, keys: Iterable[str]) -> Submission:
        """Write down a batch that is about to be created."""
        # A random tag: another run with the same requests needs a batch of its own.
        planned = Submission(secrets.token_hex(32), model, endpoint, file, list(keys))
        row = {"model": model, "endpoint": endpoint, "file": file, "keys": planned.keys}
        self._write(planned.tag, planned.tag, row)
        return planned

    def created(self, submission: Submission, batch: str) -> None:
        """Write down the id that the server gave the batch."""
        submission.batch = batch
        self._write(content_id("created", submission.tag), submission.tag, {"batch": batch})

    def finish(self, submission: Submission, keys: Iterable[str]) -> None:
        """Write down that these keys are done."""
        done = sorted(keys)
        submission.done.update(done)
        self._write(content_id("told", submission.tag, *done), submission.tag, {"told": done})

    def _write(self, key: str, tag: str, row: dict[str, Any]) -> None:
        self._journal.append({"id": key, "fault": None, "tag": tag} | row)
        self._journal.commit()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._journal.__exit__(*exc)
