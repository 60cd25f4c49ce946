"""Digests of files and model folders: a folder that is trained again keeps its name."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

MODEL_FILES = (".safetensors", ".json", ".jinja")  # what a model's answers depend on


def of(name: str | Path) -> str | None:
    """A sha256 of a file's content, or of a model's folder; None where nothing has that name."""
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            files = sorted(path for path in path.iterdir() if path.suffix in MODEL_FILES)
            return hashlib.sha256("".join(map(_line, files)).encode()).hexdigest()
        return _of_file(path) if path.is_file() else None
    except (OSError, ValueError):  # no name that a file can have
        return None


def of_model(name: str) -> str | None:
    """As `of`, where `name` is a local folder; None for any other."""
    return of(name) if Path(name).expanduser().is_dir() else None


def _line(path: Path) -> str:
    return f"{path.name} {_of_file(path)}\n"


def _of_file(path: Path) -> str:
    stat = path.stat()
    return _sha256(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4096)
def _sha256(path: Path, modified_ns: int, size: int) -> str:
    """Read again once the file has changed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
