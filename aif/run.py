"""A run folder: its lock, its settings and its files.

    runs/first/
      run.toml            settings, yours to edit
      comparisons.jsonl   what is judged                      human.jsonl  what people chose
      verdicts.jsonl      one row a call that counts now      labels.jsonl one row a comparison
      label.json          what the last labelling used, and its summary
      journal/label.jsonl every paid answer, append-only

All other files can be made again from run.toml and the journals.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import tomli_w

from aif.config.settings import Settings
from aif.errors import AifError, InputError, RunBusy, shown
from aif.store import jsonl
from aif.store.journal import Index, Journal, Reader
from aif.store.records import Label, as_row

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
Row = TypeVar("Row")
MADE_BY = {  # file -> the words between `aif` and the run's folder
    "prompts.jsonl": "respond",
    "responses.jsonl": "respond",
    "votes.jsonl": "vote",
    "revisions.jsonl": "revise",
    "kept.jsonl": "filter",
    "resampled.jsonl": "resample",
    "comparisons.jsonl": "compare",
    "verdicts.jsonl": "label --out",
    "labels.jsonl": "label --out",
}


class Run:
    """A folder with its settings; `root` is the whole run, if this is a part of one."""

    leads = True  # whether this process may write into it

    def __init__(self, path: Path, settings: Settings, root: Path | None = None):
        if not _NAME.fullmatch(path.name):
            raise InputError(
                "run folder",
                "",
                got=shown(path.name),
                expected="letters, digits, _ . -, at most 64, the first a letter or digit",
            )
        self.path = path
        self.settings = settings
        self.root = root or path

    def file(self, name: str) -> Path:
        """The path of a file of the run. Raises InputError for a symbolic link."""
        path = self.path / name
        for part in (path, path.parent):
            if part.is_symlink():
                raise InputError(part, "", got="a symbolic link", expected="a plain file or folder")
        return path

    def using(self, **tables: Any) -> Self:
        """The same folder, with these tables of the settings replaced."""
        return type(self)(self.path, self.settings.model_copy(update=tables), self.root)

    def child(self, name: str, **tables: Any) -> Self:
        """A run in the subfolder `name`, with these tables of the settings replaced."""
        return type(self)(self.file(name), self.settings.model_copy(update=tables), self.root)

    def require(self, name: str) -> Path:
        """The path of a file. If it is missing, raises InputError that names the verb to run."""
        path = self.file(name)
        if not path.exists():
            verb = MADE_BY.get(name)
            expected = f"what `aif {verb} {self.path}` makes" if verb else "a JSONL file"
            raise InputError(path, "", got="no such file", expected=expected)
        return path

    def require_labels(self) -> Path:
        """The path of labels.jsonl. Raises AifError if it is missing or labelling was cut off."""
        if self.state("label").get("in_progress"):
            again = f"`aif label --out {self.path}`"
            raise AifError(f"{self.path}: labelling was cut off; {again} first")
        return self.require("labels.jsonl")

    @property
    def sampled(self) -> str:
        """The file with the responses to compare; after `aif resample` the fine-tuned policy's."""
        later = "resampled.jsonl"
        return later if self.file(later).exists() else "responses.jsonl"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the run for this process. Raises RunBusy if another one holds it.

        The kernel drops the lock when its holder dies, so a lock is never stale.
        """
        descriptor = -1
        try:
            try:
                self.file("lock").parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
                descriptor = os.open(self.file("lock"), flags, 0o666)
                self._hold(descriptor)
                for left_over in self.path.glob(".*.part"):  # of a process that was killed
                    left_over.unlink()
            except OSError as error:
                raise AifError(f"{self.path}: cannot be written: {error.strerror}") from None
            yield
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _hold(self, lock: int) -> None:
        """Lock the file and write the process id into it, for the message of `RunBusy`."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 32, 0).decode("ascii", "replace").strip() or "?"
            raise RunBusy(
                f"{self.path}: another process (pid {holder}) is writing to this run; "
                "wait for it or stop it"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode("ascii"), 0)

    def journal(self, stage: str) -> Journal:
        """The stage's journal of paid answers, open for writing. Call it within `writing`."""
        return Journal.open(self.file("journal") / f"{stage}.jsonl")

    def answers(self, stage: str, missing_ok: bool = False) -> AbstractContextManager[Reader]:
        """The stage's journal of paid answers, to read in a `with`.

        Raises AifError for a missing journal; with `missing_ok` it counts as empty.
        """
        return Reader.reading(self.file("journal") / f"{stage}.jsonl", missing_ok)

    def index(self, stage: str) -> Index:
        """The ids of the stage's paid answers; changes nothing on the disk."""
        return Index.read(self.file("journal") / f"{stage}.jsonl")

    def write(self, name: str, rows: Iterable[Any]) -> int:
        """Replace a JSONL file by these records, atomically; returns their number."""
        return jsonl.write(self.file(name), map(as_row, rows))

    def read(self, name: str, kind: type[Row], missing_ok: bool = False) -> Iterator[Row]:
        """The records of a JSONL file of this run, one at a time.

        Raises InputError for a row that is not a `kind`, and for a missing file; with `missing_ok`
        a missing file has no rows.
        """
        if missing_ok and not self.file(name).exists():
            return
        path = self.require(name)
        for number, row in jsonl.read(path):
            try:
                yield kind(**row)
            except TypeError:
                raise InputError(
                    f"{path}:{number}", "", got=shown(row), expected=f"a {kind.__name__} row"
                ) from None

    def labels(self) -> dict[str, Label]:
        """The rows of labels.jsonl by comparison id. Raises InputError as `read` does."""
        return {row.comparison_id: row for row in self.read("labels.jsonl", Label)}

    def keep_settings(self) -> None:
        """Write run.toml if there is none, so that the next command needs no flags."""
        path = self.file("run.toml")
        if not path.exists():
            with jsonl.replacing(path) as file:
                file.write(tomli_w.dumps(self.settings.to_keep()))

    def write_state(self, stage: str, state: dict[str, Any]) -> None:
        """Write STAGE.json: what a stage used, and its summary."""
        with jsonl.replacing(self.file(f"{stage}.json")) as file:
            json.dump(state, file, indent=1)
            file.write("\n")

    def state(self, stage: str) -> dict[str, Any]:
        """The content of STAGE.json; {} if it is missing or is not valid."""
        try:
            return jsonl.loads(self.file(f"{stage}.json").read_text("ascii"))
        except (FileNotFoundError, ValueError):
            return {}


class Follower(Run):
    """A run in the other processes of a distributed training: it only reads."""

    leads = False

    @contextmanager
    def writing(self) -> Iterator[None]:
        yield

    def write(self, name: str, rows: Iterable[Any]) -> int:
        return 0

    def keep_settings(self) -> None:
        pass

    def write_state(self, stage: str, state: dict[str, Any]) -> None:
        pass
