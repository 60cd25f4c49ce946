"""What was handed to a Batch API and not yet taken back, durable across processes.

A journal (`aif.journal`) of three kinds of rows, each with the submission's `tag`:

    {"tag":"9f0c...","model":"openai-batch:m","endpoint":"/v1/chat/completions","file":"file-1",
     "keys":["51ab...", ...]}                 is about to be created
    {"tag":"9f0c...","batch":"batch_1"}       was created
    {"tag":"9f0c...","told":["51ab...", ...]} these answers are durable, or came to nothing

The first is on the disk before the server is asked, and its tag is in the batch's metadata, so that
a batch whose creation was never written down is found again. No key and no URL is in here.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from aif.store.journal import Journal
from aif.store.records import content_id


@dataclass(slots=True)
class Submission:
    """One batch as it was handed in."""

    tag: str
    model: str  # as settings name it
    endpoint: str
    file: str  # the uploaded requests
    keys: list[str]
    batch: str | None = None  # None: it may or may not have been created
    status: str = ""  # as last seen
    told: set[str] = field(default_factory=set)  # of its keys, those that are over with

    def left(self) -> list[str]:
        """The keys that somebody may still want."""
        return [key for key in self.keys if key not in self.told]


class Ledger:
    """The submissions of one stage. Build it with `Ledger.open`, use it in a `with`."""

    def __init__(self, journal: Journal):
        self._journal = journal

    @classmethod
    def open(cls, path: Path) -> Ledger:
        """Read what is there and be ready to append; one process at a time."""
        return cls(Journal.open(path))

    def damage(self) -> list[str]:
        """A line for the person about every row that cannot be read."""
        return self._journal.damage()

    def under_way(self) -> list[Submission]:
        """What was handed in and has asks that nobody has been told of, oldest first."""
        found: dict[str, Submission] = {}
        for key in self._journal.index.answered:
            row = self._journal.newest(key.hex()) or {}
            if "keys" in row:
                names = ("tag", "model", "endpoint", "file", "keys")
                found[row["tag"]] = Submission(*(row[name] for name in names))
            elif submission := found.get(row["tag"]):  # else its first row is damaged
                submission.batch = row.get("batch", submission.batch)
                submission.told.update(row.get("told", ()))
        return [submission for submission in found.values() if submission.left()]

    def plan(self, model: str, endpoint: str, file: str, keys: Iterable[str]) -> Submission:
        """Write down what is about to be handed in."""
        # Drawn, not computed: another run that asks the same is to have a batch of its own.
        planned = Submission(secrets.token_hex(32), model, endpoint, file, list(keys))
        row = {"model": model, "endpoint": endpoint, "file": file, "keys": planned.keys}
        self._write(planned.tag, planned.tag, row)
        return planned

    def created(self, submission: Submission, batch: str) -> None:
        """Write down under which id the server knows it."""
        submission.batch = batch
        self._write(content_id("created", submission.tag), submission.tag, {"batch": batch})

    def told(self, submission: Submission, keys: Iterable[str]) -> None:
        """Write down that these of its asks are over with."""
        done = sorted(keys)
        submission.told.update(done)
        self._write(content_id("told", submission.tag, *done), submission.tag, {"told": done})

    def _write(self, key: str, tag: str, row: dict[str, Any]) -> None:
        self._journal.append({"id": key, "fault": None, "tag": tag} | row)
        self._journal.commit()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._journal.__exit__(*exc)
