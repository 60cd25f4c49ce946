"""JSON Lines in and out: strict about what comes in, plain ASCII in what goes out.

Lines end at \\n alone (text may hold U+2028 or \\x85), and a lone surrogate survives as its escape.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import jsonlines

from aif.errors import AifError, InputError, shown

dumps = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return row


_decoder = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_unique_keys)


def loads(text: str) -> Any:
    """Parse JSON from a stranger. Raises ValueError for all that is not plain JSON.

    That includes NaN, repeated keys, integers too long to hold and nesting too deep to follow.
    """
    try:
        return _decoder.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file with their line numbers; blank lines are passed over."""
    try:
        with open(path, "rb") as file:  # bytes: only \n ends a line
            yield from _rows(file, path)
    except FileNotFoundError:
        raise InputError(path, "", got="no such file", expected="a JSONL file") from None
    except IsADirectoryError:
        raise InputError(path, "", got="a folder", expected="a JSONL file") from None
    except OSError as error:
        raise AifError(f"{path}: {error.strerror}") from None


def _rows(file: IO[bytes], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = jsonlines.Reader(file, loads=loads)
    for number in itertools.count(1):
        try:
            yield number, reader.read(type=dict)
        except EOFError:
            return
        except jsonlines.InvalidLineError as error:
            if error.line.strip():
                raise InputError(
                    f"{path}:{number}",
                    "",
                    got=_reason(error),
                    expected="a JSON object on one line",
                ) from None


def _reason(error: jsonlines.InvalidLineError) -> str:
    cause = error.__cause__
    if isinstance(cause, json.JSONDecodeError):
        return f"bad JSON: {cause.msg} at character {cause.pos + 1}"
    if cause is None:  # JSON, but null, a list, a number or a text
        return shown(loads(error.line))
    return f"bad {'UTF-8' if isinstance(cause, UnicodeDecodeError) else 'JSON'}: {cause}"


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """Write a file whole or not at all: a `.part` beside it, fsync, rename, fsync the folder."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "x", encoding="ascii", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise AifError(f"{path}: could not be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename or a new file in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Replace `path` by `rows`, atomically; returns how many there were."""
    with replacing(path) as file, jsonlines.Writer(file, dumps=dumps) as writer:
        return sum(writer.write(row) is not None for row in rows)
