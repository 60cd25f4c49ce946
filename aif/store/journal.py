"""The append-only file that makes a paid answer durable.

Each row is one line with a checksum over the bytes before it:

    {"id":"9f0c...","fault":null,"logprobs":{"Yes":-0.1,"No":-2.3},"crc":"5e2d91aa"}

A row counts as soon as it is on the disk (`durable`). A row with a fault is only a record, never an
answer. `Journal.open` cuts off a torn last line (from a crash or a full disk) and reports every
other line that fails its checksum. Such a row does not count, so its call is made again. Only one
process may write at a time; the run's lock ensures that.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aif.errors import AifError
from aif.store.jsonl import dumps, sync_folder

_HEAD = re.compile(rb'\{"id":"([0-9a-f]{64})","fault":(null|"\w+")')
_LOOSE_ID = re.compile(rb'"id":"([^"]{1,80})"')
_TAIL = len(b',"crc":"00000000"}\n')
_LINGER_S = 0.02  # rows that arrive within this share one fsync


@dataclass(frozen=True, slots=True)
class Damage:
    """A line that fails its checksum. `key` is its id, if it can still be read.

    If a line end is lost, two rows become one line; `key` then has both ids.
    """

    line: int
    key: str


@dataclass(slots=True)
class Index:
    """The ids in a journal, with their places: ids as 32 bytes, offsets in bytes."""

    answered: dict[bytes, int] = field(default_factory=dict)  # -> offset of the newest answer
    failed: dict[bytes, int] = field(default_factory=dict)  # the same for ids with only faults
    damage: list[Damage] = field(default_factory=list)
    lines: int = 0
    end: int = 0  # where the last whole line ends

    @classmethod
    def read(cls, path: Path) -> Index:
        """Read the index of a journal and change nothing; a missing file counts as empty."""
        index = cls()
        if path.exists():
            for index.lines, (offset, size, row) in enumerate(scan(path), 1):
                index.end = offset + size
                if isinstance(row, str):
                    index.damage.append(Damage(index.lines, row))
                else:
                    index.note(*row, offset)
        return index

    def note(self, key: bytes, is_fault: bool, offset: int) -> None:
        """Add the row at `offset`. A later fault never replaces an answer."""
        if not is_fault:
            self.answered[key] = offset
            self.failed.pop(key, None)
        elif key not in self.answered:
            self.failed[key] = offset


class Reader:
    """Reads rows by id; it repairs nothing, since another process may be writing.

    Rows that are appended later are not seen.
    """

    def __init__(self, path: Path, descriptor: int, index: Index):
        self.path = path
        self.index = index
        self._descriptor = descriptor

    @staticmethod
    @contextlib.contextmanager
    def reading(path: Path, missing_ok: bool = False) -> Iterator[Reader]:
        """Open a journal to read it in a `with`.

        With `missing_ok` a missing file is an empty journal; otherwise it raises AifError.
        """
        if missing_ok and not path.exists():
            yield Reader(path, -1, Index())
            return
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError as error:
            raise AifError(f"{path}: could not be opened: {error.strerror}") from error
        try:
            yield Reader(path, descriptor, Index.read(path))
        finally:
            os.close(descriptor)

    def newest(self, key: str) -> dict[str, Any] | None:
        """The row of an id: its newest answer, else its newest fault, else None."""
        raw = bytes.fromhex(key)
        offset = self.index.answered.get(raw, self.index.failed.get(raw))
        return None if offset is None else self._row(offset)

    def _row(self, offset: int) -> dict[str, Any]:
        # Most lines are shorter than 4 kB; read on if this one is longer.
        data = os.pread(self._descriptor, 4096, offset)
        while b"\n" not in data:
            more = os.pread(self._descriptor, 1 << 20, offset + len(data))
            if not more:
                raise AifError(f"{self.path}: something else has cut it short")
            data += more
        return json.loads(data[: data.index(b"\n")])


class Journal(Reader):
    """Appends rows durably. Create it with `Journal.open`; close it, or use it in a `with`."""

    def __init__(self, path: Path, descriptor: int, index: Index):
        super().__init__(path, descriptor, index)
        self.durable = 0  # rows of this process that are on the disk
        self._waiting: list[tuple[bytes, bytes, bool]] = []  # line, id, whether it is a fault
        self._changed = threading.Condition()
        self._busy = self._closing = False
        self._error: AifError | None = None
        self._writer = threading.Thread(target=self._write_groups, daemon=True, name="journal")

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open or create a journal to append to it; cuts off a torn last line."""
        descriptor = -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
            sync_folder(path.parent)
            os.fsync(descriptor)  # rows of a killed process may be in memory only; they count now
            index = Index.read(path)
            _cut_torn_line(descriptor, index)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise AifError(f"{path}: could not be opened: {error.strerror}") from error
        journal = cls(path, descriptor, index)
        journal._writer.start()
        return journal

    def append(self, row: dict[str, Any]) -> None:
        """Put a row (`id`, `fault` and any other keys) in the queue; it is not yet durable."""
        line = encode(row)
        with self._changed:
            self._raise_if_broken()
            self._waiting.append((line, bytes.fromhex(row["id"]), row["fault"] is not None))
            self._changed.notify_all()

    def commit(self) -> None:
        """Wait until every appended row is on the disk. Raises AifError if that fails."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not (self._waiting or self._busy))
            self._raise_if_broken()

    def _raise_if_broken(self) -> None:
        if self._error is not None:
            raise self._error

    def _write_groups(self) -> None:
        """The writer thread: writes all waiting rows with one write and one fsync."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
            if not self._closing:
                time.sleep(_LINGER_S)
            with self._changed:
                group, self._waiting, self._busy = self._waiting, [], True
            try:
                self._write(b"".join(line for line, _, _ in group))
            except Exception as error:  # of any kind, or `commit` would wait for ever
                self._give_up(error)
                return
            with self._changed:
                for line, key, is_fault in group:
                    self.index.note(key, is_fault, self.index.end)
                    self.index.end += len(line)
                self.durable += len(group)
                self._busy = False
                self._changed.notify_all()

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]
        os.fsync(self._descriptor)

    def _give_up(self, error: Exception) -> None:
        # After a failed fsync the kernel may drop the pages and report success next time
        # (https://lwn.net/Articles/752063/), so rows that may not be durable are cut off.
        with contextlib.suppress(OSError):  # if this fails, the next open cuts them off
            os.ftruncate(self._descriptor, self.index.end)
        with self._changed:
            self._error = AifError(
                f"{self.path}: could not be written: {getattr(error, 'strerror', None) or error}; "
                f"what is durable is kept ({self.durable:,} new rows), the same command resumes"
            )
            self._changed.notify_all()

    def damage(self) -> list[str]:
        """A message for every row that fails its checksum."""
        return [
            f"{self.path}:{damage.line}: damaged (key {damage.key}); it is asked again if needed"
            for damage in self.index.damage
        ]

    def close(self) -> None:
        """Write the waiting rows and close the file. Raises AifError if that fails."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._writer.join()
        os.close(self._descriptor)
        self._raise_if_broken()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            self.close()
        except AifError:
            if kind is None:  # the first error matters more
                raise


def encode(row: dict[str, Any]) -> bytes:
    """The line of a row: `id` and `fault` first (`scan` relies on this), the checksum last."""
    body = dumps({"id": row["id"], "fault": row["fault"]} | row)[:-1].encode("ascii")
    return body + b',"crc":"%08x"}\n' % zlib.crc32(body)


def scan(path: Path) -> Iterator[tuple[int, int, tuple[bytes, bool] | str]]:
    """(offset, size, (id, whether it is a fault)) of every whole line; a torn last line is left
    out.

    For a line that fails its checksum, the third item is a text with the ids that can still be
    read. It only reads, so another process may be writing.
    """
    offset = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            head = _HEAD.match(line)
            body = line[:-_TAIL]
            if head and line[-_TAIL:] == b',"crc":"%08x"}\n' % zlib.crc32(body):
                yield offset, len(line), (bytes.fromhex(head[1].decode()), head[2] != b"null")
            else:
                yield offset, len(line), _ids_in(line)
            offset += len(line)


def _ids_in(damaged: bytes) -> str:
    return ", ".join(key.decode("latin-1") for key in _LOOSE_ID.findall(damaged)) or "?"


def _cut_torn_line(descriptor: int, index: Index) -> None:
    """Cut off the text after the last whole line, and report it as damage."""
    torn = os.fstat(descriptor).st_size - index.end
    if torn:
        index.damage.append(Damage(index.lines + 1, _ids_in(os.pread(descriptor, torn, index.end))))
        os.ftruncate(descriptor, index.end)
        os.fsync(descriptor)
