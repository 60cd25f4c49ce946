"""What all training stages share: to skip finished work, to resume, or to start again.

A stage's work is a function of its data, settings and model. Their digest is stored with the
result. By this digest the same command skips the work, resumes it, or starts again.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from aif.config.settings import TrainSettings
from aif.config.versions import for_digest
from aif.errors import AifError, InputError, shown
from aif.models.load import torch_dtype, usable_device
from aif.progress import Progress
from aif.run import Run
from aif.store import checkpoint
from aif.store.records import content_id
from aif.train.distributed import on_main_process
from aif.train.model import learning_rate, model_identity

# transformers' names of ours.
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
SAVE_EVERY_S = 600.0
# Settings that may change in the middle of a run: where and how to compute, not what.
FREE = {"device", "micro_tokens", "packing", "share_prompt", "gradient_checkpointing"}
FREE |= {"save_every", "keep_checkpoints", "members", "combine", "curve", "trackers"}
FREE |= {"vllm_memory", "require_audit"}


@contextmanager
def training_in(run: Run) -> Iterator[None]:
    """Hold the run for this process, and silence the warnings that peft and transformers cause
    together."""
    with run.writing(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def start_model(run: Run, named: str | None) -> str:
    """The model that training starts from: `named`, or else the SFT model, or else the policy."""
    if named:
        return named
    sft = run.file("sft")
    return str(sft) if checkpoint.sealed(sft) is not None else run.settings.policy.weights


def check_start(stage: str, name: str, folder: Path) -> None:
    """Raise InputError if a stage is to start from the model that it makes."""
    if Path(name).expanduser().resolve() == folder.resolve():
        raise InputError(
            stage, "model", got=f"{shown(name)}, what it makes", expected="the model to start from"
        )


def digest_of(stage: str, settings: TrainSettings, name: str, *data: str) -> str:
    """A digest of all that the final weights depend on; `data` are digests of the tokens."""
    resolved = {
        "model": model_identity(name),
        "dtype": str(torch_dtype(settings.dtype, usable_device(settings.device))),
        "learning_rate": learning_rate(settings),
    }
    counted = {key: one for key, one in for_digest(settings, stage).items() if key not in FREE}
    return content_id(stage, counted | resolved, *data)


def done_before(
    run: Run, stage: str, folder: Path, about: dict[str, Any], progress: Progress
) -> dict[str, Any] | None:
    """The last summary, if `folder` is complete and has the same digest. Else None, and the stage
    is marked as in progress."""
    last = run.state(stage)
    if last.get("digest", about["digest"]) != about["digest"]:
        progress.say(f"{stage}: data, settings or model have changed since the last time: anew")
    elif "steps" in last:
        why = checkpoint.fault(folder)
        if why is None and checkpoint.sealed(folder) == about:
            progress.say(f"{folder}: done already, of the same data, settings and model")
            return last
        progress.say(f"{folder}: {why or 'it is of another run'}; it is made again")
    run.write_state(stage, {**about, "in_progress": True})
    return None


@dataclass
class Checkpoints:
    """A stage's checkpoints, each complete or not used; all processes call its methods together."""

    folder: Path
    about: dict[str, Any]  # of the stage; only a checkpoint with the same is resumed
    settings: TrainSettings
    progress: Progress
    needed: tuple[tuple[str, ...], ...] = checkpoint.TRAINER_FILES
    saved_at: float = field(default_factory=time.monotonic)

    def newest(self) -> Path | None:
        """The newest whole checkpoint; without one, older checkpoints are removed."""

        def find() -> Path | None:
            newest = checkpoint.newest(self.folder, self.about, self.progress, self.needed)
            if newest is None:
                shutil.rmtree(self.folder, ignore_errors=True)
            return newest

        return on_main_process(find)

    def best(self, step: int) -> Path | None:
        """The checkpoint of the best step; None, with a warning, if it is damaged."""
        folder = self.folder / f"checkpoint-{step}"
        if why := checkpoint.fault(folder, self.needed):
            self.progress.say(f"{folder}: {why}; ending with the last weights instead")
            return None
        return folder

    def due(self, step: int) -> bool:
        """Whether to save after `step`: every `save_every` steps, or else every ten minutes."""
        if self.settings.save_every:
            return step % self.settings.save_every == 0
        return time.monotonic() - self.saved_at >= SAVE_EVERY_S

    @contextmanager
    def saving(self, step: int, best: int | None) -> Iterator[Path]:
        """The folder to save `step` in; it is then marked complete, and older ones may go."""
        folder, state = self.folder / f"checkpoint-{step}", PartialState()
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)  # left by a kill
        state.wait_for_everyone()
        try:
            yield folder
        except OSError as error:
            raise AifError(f"{folder}: could not be written: {error.strerror or error}") from error
        state.wait_for_everyone()
        if state.is_main_process:
            checkpoint.seal(folder, self.about)
            checkpoint.rotate(self.folder, self.settings.keep_checkpoints, best)
        self.saved_at = time.monotonic()
