"""What a model is besides its name: a folder that is trained anew keeps its name."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

COUNTS = (".safetensors", ".json", ".jinja")  # of a model's folder, what its answers depend on


def digest(name: str) -> str | None:
    """A sha256 over the files of the local model `name`; None where that is no folder."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return None
    files = sorted(path for path in folder.iterdir() if path.suffix in COUNTS)
    total = hashlib.sha256()
    for path in files:
        found = path.stat()
        total.update(f"{path.name} {_sha256(path, found.st_mtime_ns, found.st_size)}\n".encode())
    return total.hexdigest()


@lru_cache(maxsize=4096)
def _sha256(path: Path, modified_ns: int, size: int) -> str:
    """Of a file's content, read again once it has changed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
