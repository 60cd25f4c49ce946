"""Reinforcement learning: policy + reward + prompts -> ppo/, a model that transformers loads.

    aif ppo RUN --set ppo.kl_coef=0.05

The algorithm is in `ppo_loop`; here is what surrounds it: what it starts from, when it looks, saves
and stops, and what it leaves. Stopped and started again it ends with the same bits as if it had not
been stopped.
"""

from __future__ import annotations

import functools
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aif.errors import AifError, Interrupted, JudgeStopped
from aif.models.load import ends_of
from aif.progress import Progress
from aif.run import Run
from aif.store import checkpoint
from aif.train.distributed import any_rank, ends_process_group, on_main_process
from aif.train.metrics import Metrics
from aif.train.model import generation_ends, save
from aif.train.ppo.actor_critic import ActorCritic
from aif.train.ppo.evaluate import Watch, best_step, falls, looks
from aif.train.ppo.loop import PPO
from aif.train.ppo.rewards import Reward
from aif.train.ppo.setup import (
    STAGE,
    Prepared,
    check_settings,
    load_critic,
    look_every,
    made,
    memory_line,
)
from aif.train.ppo.update import NotFinite
from aif.train.resume import check_start, done_before, training_in
from aif.train.trainer import SAVE_EVERY_S, stopping

# One of each row is in a checkpoint that is resumed from.
FILES = (
    ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
    ("optimizer.bin",),
    ("random_states_0.pkl",),
    ("custom_checkpoint_0.pkl",),
    ("custom_checkpoint_1.pkl",),
)


@dataclass
class Session:
    """One PPO training from its first or its last saved step to its end."""

    run: Run
    ppo: PPO
    watch: Watch | None
    about: dict[str, Any]
    progress: Progress
    metrics: Metrics
    stop: threading.Event = field(default_factory=threading.Event)
    saved_at: float = field(default_factory=time.monotonic)

    def resume(self) -> int:
        """Go back to the newest whole checkpoint; returns its step, 0 without one."""
        folder = self.run.file("checkpoints") / STAGE
        found = on_main_process(lambda: self._newest(folder))
        if found is None:
            return 0
        self._load(found)
        return self.ppo.position.step

    def _newest(self, folder: Path) -> Path | None:
        found = checkpoint.newest(folder, self.about, self.progress, FILES)
        if found is None:
            shutil.rmtree(folder, ignore_errors=True)
        return found

    def _load(self, folder: Path) -> None:
        # Not strict, as frozen weights are not in a checkpoint.
        self.ppo.accelerator.load_state(str(folder), strict=not self.ppo.settings.lora)

    def train(self) -> None:
        """Step after step to the end. Raises Interrupted, a checkpoint kept, when a signal or a
        judge that is gone ends it; AifError where numbers are none."""
        position, steps = self.ppo.position, len(self.ppo.prompts)
        try:
            self._look(steps)
            while position.step < steps and not self._fallen():
                self._tell(self._step())
                if any_rank(self._save_due()) and position.step < steps:
                    self.save()
                self._look(steps)
                if any_rank(self.stop.is_set()) and position.step < steps:
                    raise Interrupted(
                        f"interrupted at step {position.step:,} of {steps:,}; "
                        "the same command resumes"
                    )
        except (Interrupted, JudgeStopped):
            if position.step:  # a step that was cut off has changed nothing yet
                self.save()
            raise
        self.metrics.put(position.log, now=True)

    def _step(self) -> dict[str, float]:
        number = self.ppo.position.step + 1
        try:
            return self.ppo.step()
        except NotFinite as error:
            last = checkpoint.newest(self._folder, self.about, self.progress, FILES)
            raise AifError(
                f"ppo: step {number}: {error}; a lower ppo.learning_rate may help. "
                f"The last good checkpoint is {last or 'none'}"
            ) from error
        except AifError as error:
            if type(error) is AifError:
                raise AifError(f"ppo: step {number}: {error}") from error
            raise

    @property
    def _folder(self) -> Path:
        return self.run.file("checkpoints") / STAGE

    def _tell(self, measured: dict[str, float]) -> None:
        position = self.ppo.position
        note = (
            f"score {measured['objective/scores']:.2f}, kl {measured['objective/kl']:.1f}, "
            f"{measured['val/response_length']:.0f} tokens"
        )
        self.progress.update(position.step, note=note)
        self.metrics.put(position.log)
        self.ppo.accelerator.log(measured, step=position.step)

    def _look(self, steps: int) -> None:
        """Look where it is due and has not been done; keep the weights that gold is highest with,
        if they may be what it ends with."""
        step, log = self.ppo.position.step, self.ppo.position.log
        due = step >= steps or step % look_every(self.ppo.settings, steps) == 0
        if not self.watch or not due or step in looks(log):
            return
        self.ppo.accelerator.log(self.watch.look(), step=step)
        if self._ends_with_best and best_step(log) == step < steps:
            self.save()

    def _save_due(self) -> bool:
        every = self.ppo.settings.save_every
        if every:
            return self.ppo.position.step % every == 0
        return time.monotonic() - self.saved_at >= SAVE_EVERY_S

    @property
    def _ends_with_best(self) -> bool:
        settings = self.ppo.settings
        return bool(settings.load_best or settings.stop_when_gold_falls)

    def _fallen(self) -> bool:
        most = self.ppo.settings.stop_when_gold_falls
        if not most or falls(self.ppo.position.log) < most:
            return False
        self.progress.say(f"ppo: gold has been below its best for {most} looks: stopped")
        return True

    def save(self) -> None:
        """A checkpoint of this step, complete or not used."""
        position, accelerator = self.ppo.position, self.ppo.accelerator
        folder = self._folder / f"checkpoint-{position.step}"
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)  # what a kill left of it
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(folder))
        except OSError as error:
            raise AifError(f"{folder}: could not be written: {error.strerror or error}") from error
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            checkpoint.seal(folder, self.about)
            best = best_step(position.log) if self._ends_with_best else None
            checkpoint.rotate(self._folder, self.ppo.settings.keep_checkpoints, best)
        self.saved_at = time.monotonic()

    def end_with_best(self) -> int | None:
        """Take the weights of the highest gold; returns their step if it is not the last one."""
        best = best_step(self.ppo.position.log)
        if not self._ends_with_best or best in (None, self.ppo.position.step):
            return None
        folder, log = self._folder / f"checkpoint-{best}", self.ppo.position.log
        if why := checkpoint.fault(folder, FILES):
            self.progress.say(f"{folder}: {why}; ending with the last weights instead")
            return None
        self._load(folder)
        self.ppo.position.log = log
        return best


def _save(run: Run, prepared: Prepared, actor: ActorCritic, about: dict[str, Any]) -> None:
    """The policy in ppo/ and the critic in ppo-critic/, to be gone on with or looked into."""
    tokenizer, settings = prepared.tokenizer, run.settings.ppo
    if actor.critic is not None:
        load = functools.partial(load_critic, settings=settings)
        folder = run.file(f"{STAGE}-critic")
        save(folder, actor.critic, tokenizer, prepared.critic, about, load=load)
    save(
        run.file(STAGE), actor.policy, tokenizer, prepared.name, about,
        finish=lambda model: generation_ends(model, ends_of(model, tokenizer)),
    )  # fmt: skip


def _summary(
    run: Run, prepared: Prepared, algorithm: PPO, began_at: int, best: int | None
) -> dict[str, Any]:
    log = algorithm.position.log
    seen = list(looks(log).values())
    steps = [entry for entry in log if "objective/kl" in entry]
    return {
        "run": str(run.path),
        "model": str(run.file(STAGE)),
        "from": prepared.name,
        "algorithm": run.settings.ppo.algorithm,
        "prompts": len(prepared.learn),
        "eval_prompts": len(prepared.held_out),
        "dropped": prepared.tokeniser.dropped,
        "steps": int(log[-1]["step"]),
        "resumed_from": began_at,
        "best_step": best,
        "first": steps[0],
        "last": steps[-1],
        "eval_before": seen[0] if seen else None,
        "eval_after": looks(log).get(best, seen[-1]) if seen else None,
    }


@ends_process_group
def ppo(run: Run, progress: Progress, sources: Mapping[str, Reward] | None = None) -> dict:
    """Train the policy by reinforcement into ppo/; returns the summary.

    `sources` are rewards by name beside `model` and functions: `judge`. Raises InputError for bad
    settings or data, Interrupted when a signal stops it.
    """
    name = check_settings(run)
    folder = run.file(STAGE)
    check_start(STAGE, name, folder)
    with training_in(run):
        prepared = Prepared(run, name, sources or {})
        run.keep_settings()
        about = {"digest": prepared.digest()}
        if last := done_before(run, STAGE, folder, about, progress):
            return last
        algorithm = made(run, prepared)
        try:
            summary = about | _run(run, prepared, algorithm, about, progress)
        finally:
            algorithm.rollouts.close()
            for tracker in algorithm.accelerator.trackers:
                tracker.finish()
        run.write_state(STAGE, summary)
    return summary


def _run(
    run: Run, prepared: Prepared, algorithm: PPO, about: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Train to the end and leave the models; returns the summary."""
    progress.say(memory_line(algorithm))
    watch = Watch(run, algorithm, prepared.held_out, prepared.gold) if prepared.held_out else None
    session = Session(run, algorithm, watch, about, progress, Metrics(run, STAGE))
    began_at = session.resume()
    progress.start(STAGE, len(algorithm.prompts), done=began_at)
    try:
        with stopping(session.stop, progress):
            session.train()
    finally:
        progress.finish()
    best = session.end_with_best()
    if run.leads:
        _save(run, prepared, algorithm.accelerator.unwrap_model(algorithm.learner.model), about)
    return _summary(run, prepared, algorithm, began_at, best)
