"""Folders that are whole or not used: a file COMPLETE, written last, with every file's sha256.

{"about": {"digest": "..."}, "files": {"model.safetensors": [269060552, "..."], ...}}

A checkpoint is resumed from only if every file that resuming needs is there and unchanged, and if
it is of the same data, settings and model. A broken one is passed over for the one before.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aif.errors import AifError
from aif.progress import Progress
from aif.store import jsonl

COMPLETE = "COMPLETE"
_STEP = re.compile(r"checkpoint-(\d+)")

# What transformers' Trainer leaves, any of each row's names; without one, a resumed run would
# begin with fresh moments or another learning rate, and no error.
TRAINER_FILES = (
    ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"),
    ("optimizer.pt",),
    ("scheduler.pt",),
    ("rng_state.pth", "rng_state_0.pth"),
    ("trainer_state.json",),
)


def seal(folder: Path, about: dict[str, Any]) -> None:
    """Make `folder` durable and mark it complete. Raises AifError where it cannot be written."""
    try:
        files = {}
        for path in _files(folder):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            files[str(path.relative_to(folder))] = [path.stat().st_size, _sha256(path)]
        with jsonl.replacing(folder / COMPLETE) as file:
            json.dump({"about": about, "files": files}, file, indent=1)
        jsonl.sync_folder(folder.parent)
    except OSError as error:
        raise AifError(f"{folder}: could not be written: {error.strerror}") from error


def sealed(folder: Path) -> dict[str, Any] | None:
    """The `about` that `folder` was sealed with; None if it is not complete."""
    try:
        seal_row = jsonl.loads((folder / COMPLETE).read_text("ascii"))
        return seal_row["about"] if isinstance(seal_row["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fault(folder: Path, needed: Iterable[tuple[str, ...]] = ()) -> str | None:
    """Why `folder` cannot be used; None if it is complete and every byte is unchanged.

    Each tuple of names in `needed` must have one name that is among the files.
    """
    if sealed(folder) is None:
        return "it is not complete"
    files = jsonl.loads((folder / COMPLETE).read_text("ascii"))["files"]
    for names in needed:
        if not any(name in files for name in names):
            return f"it has no {names[0]}"
    for name, (size, sha256) in files.items():
        try:
            if (folder / name).stat().st_size != size:
                return f"{name} is not as long as it was"
            if _sha256(folder / name) != sha256:
                return f"{name} is not what was written"
        except OSError:
            return f"{name} is missing"
    return None


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint-STEP in `folder`, the newest first, whole or not."""
    paths = folder.iterdir() if folder.is_dir() else ()
    matches = ((_STEP.fullmatch(path.name), path) for path in paths)
    return sorted(((int(m[1]), path) for m, path in matches if m), reverse=True)


def newest(
    folder: Path,
    about: dict[str, Any],
    progress: Progress,
    needed: Iterable[tuple[str, ...]] = TRAINER_FILES,
) -> Path | None:
    """The newest whole checkpoint that was sealed with `about`; a broken one is warned about."""
    for _, path in checkpoints(folder):
        why = fault(path, needed)
        if why is None and sealed(path) == about:
            return path
        if why is not None:
            progress.say(f"{path}: not resumed from: {why}")
    return None


def rotate(folder: Path, keep: int, best: int | None = None) -> None:
    """Remove all checkpoints but the `keep` newest and the one of step `best`."""
    for step, path in checkpoints(folder)[keep:]:
        if step != best:
            shutil.rmtree(path, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
