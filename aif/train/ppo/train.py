"""Reinforcement learning: policy + reward + prompts -> ppo/, a model that transformers loads.

    aif ppo RUN --set ppo.kl_coef=0.05

`loop` has the algorithm. This module resumes it, decides when to evaluate, save and stop, and
writes the models. A run that was stopped and started again ends with the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from aif.errors import AifError, Interrupted, JudgeStopped
from aif.models.load import ends_of
from aif.progress import Progress
from aif.run import Run
from aif.store import checkpoint
from aif.train.distributed import any_rank, ends_process_group
from aif.train.metrics import Metrics
from aif.train.model import generation_ends, save
from aif.train.ppo.actor_critic import ActorCritic
from aif.train.ppo.evaluate import SAMPLES, Evaluator, best_step, evals, evals_since_best
from aif.train.ppo.loop import PPO
from aif.train.ppo.rewards import RewardFunction
from aif.train.ppo.setup import STAGE, Inputs, build, check_settings, load_critic, memory_line
from aif.train.ppo.update import NotFinite
from aif.train.resume import Checkpoints, check_start, done_before, training_in
from aif.train.trainer import stopping

EVALS = 10  # in a run without ppo.eval_every
# A checkpoint that can be resumed has one file of each row.
FILES = (
    ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
    ("optimizer.bin",),
    ("random_states_0.pkl",),
    ("custom_checkpoint_0.pkl",),
    ("custom_checkpoint_1.pkl",),
)


@ends_process_group
def ppo(
    run: Run, progress: Progress, sources: Mapping[str, RewardFunction] | None = None
) -> dict[str, Any]:
    """Train the policy by reinforcement into ppo/; returns the summary.

    `sources` are rewards by name besides `model` and functions: `judge`. Raises InputError for bad
    settings or data, Interrupted when a signal stops it.
    """
    name = check_settings(run)
    folder = run.file(STAGE)
    check_start(STAGE, name, folder)
    with training_in(run):
        inputs = Inputs(run, name, sources or {})
        run.keep_settings()
        about = {"digest": inputs.digest()}
        if last := done_before(run, STAGE, folder, about, progress):
            return last
        algorithm = build(inputs, run.path)
        try:
            progress.say(memory_line(algorithm))
            evaluator = None
            if inputs.held_out:
                evaluator = Evaluator(
                    algorithm, inputs.held_out, inputs.gold_reward, run.file(SAMPLES)
                )
            folders = run.file("checkpoints") / STAGE
            checkpoints = Checkpoints(folders, about, inputs.settings, progress, FILES)
            loop = TrainingLoop(algorithm, evaluator, checkpoints, progress, Metrics(run, STAGE))
            resumed_from, best = loop.run()
            if run.leads:
                model = algorithm.accelerator.unwrap_model(algorithm.learner.model)
                _write_models(folder, run.file(f"{STAGE}-critic"), inputs, model, about)
        finally:
            algorithm.rollouts.close()
            for tracker in algorithm.accelerator.trackers:
                tracker.finish()
        summary = about | {"run": str(run.path), "model": str(folder)}
        summary |= _summary(inputs, algorithm.state.log, resumed_from, best)
        run.write_state(STAGE, summary)
    return summary


@dataclass
class TrainingLoop:
    """One PPO training from step 0, or the last checkpoint, to its end."""

    ppo: PPO
    evaluator: Evaluator | None
    checkpoints: Checkpoints
    progress: Progress
    metrics: Metrics
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> tuple[int, int | None]:
        """Train to the end. Returns the step that it resumed from (0: none) and the step whose
        weights the policy ends with (None: the last)."""
        resumed_from = self._resume()
        with (
            self.progress.work(STAGE, len(self.ppo.prompts), done=resumed_from),
            stopping(self.stop, self.progress),
        ):
            self._train()
        return resumed_from, self._load_best()

    def _train(self) -> None:
        """Step after step. Raises Interrupted after a signal and JudgeStopped without a judge, with
        a checkpoint; AifError for numbers that are not finite."""
        state, steps = self.ppo.state, len(self.ppo.prompts)
        try:
            self._evaluate(steps)
            while state.step < steps and not self._gold_falls():
                self._report(self._step())
                if any_rank(self.checkpoints.due(state.step)) and state.step < steps:
                    self._save()
                self._evaluate(steps)
                if any_rank(self.stop.is_set()) and state.step < steps:
                    raise Interrupted(
                        f"interrupted at step {state.step:,} of {steps:,}; the same command resumes"
                    )
        except (Interrupted, JudgeStopped):
            if state.step:  # an unfinished step has changed nothing
                self._save()
            raise
        self.metrics.put(state.log, now=True)

    def _step(self) -> dict[str, float]:
        number = self.ppo.state.step + 1
        try:
            return self.ppo.step()
        except NotFinite as error:
            folder, about = self.checkpoints.folder, self.checkpoints.about
            last = checkpoint.newest(folder, about, self.progress, FILES)
            raise AifError(
                f"ppo: step {number}: {error}; a lower ppo.learning_rate may help. "
                f"The last good checkpoint is {last or 'none'}"
            ) from error
        except AifError as error:
            if type(error) is AifError:
                raise AifError(f"ppo: step {number}: {error}") from error
            raise

    def _report(self, metrics: dict[str, float]) -> None:
        state = self.ppo.state
        note = (
            f"score {metrics['objective/scores']:.2f}, kl {metrics['objective/kl']:.1f}, "
            f"{metrics['val/response_length']:.0f} tokens"
        )
        self.progress.update(state.step, note=note)
        self.metrics.put(state.log)
        self.ppo.accelerator.log(metrics, step=state.step)

    def _evaluate(self, steps: int) -> None:
        """Evaluate if it is due and not done; keep the best weights if the policy may end with
        them."""
        state, settings = self.ppo.state, self.ppo.settings
        every = settings.eval_every or max(1, steps // EVALS)
        due = state.step >= steps or state.step % every == 0
        if not self.evaluator or not due or state.step in evals(state.log):
            return
        self.ppo.accelerator.log(self.evaluator.evaluate(), step=state.step)
        if self._ends_with_best and best_step(state.log) == state.step < steps:
            self._save()

    @property
    def _ends_with_best(self) -> bool:
        settings = self.ppo.settings
        return bool(settings.load_best or settings.stop_when_gold_falls)

    def _gold_falls(self) -> bool:
        patience = self.ppo.settings.stop_when_gold_falls
        if not patience or evals_since_best(self.ppo.state.log) < patience:
            return False
        self.progress.say(
            f"ppo: stopped: the gold reward is below its best for {patience} evaluations"
        )
        return True

    def _save(self) -> None:
        """A checkpoint of this step, complete or not used."""
        state = self.ppo.state
        best = best_step(state.log) if self._ends_with_best else None
        with self.checkpoints.saving(state.step, best) as folder:
            self.ppo.accelerator.save_state(str(folder))

    def _resume(self) -> int:
        """Load the newest whole checkpoint, or remove the old ones; returns its step or 0."""
        folder = self.checkpoints.newest()
        if folder is None:
            return 0
        self._load(folder)
        return self.ppo.state.step

    def _load(self, folder: Path) -> None:
        # Not strict with adapters: frozen weights are not in a checkpoint.
        self.ppo.accelerator.load_state(str(folder), strict=not self.ppo.settings.lora)

    def _load_best(self) -> int | None:
        """Load the weights with the highest gold reward; returns their step if it is not the last
        one."""
        state = self.ppo.state
        best, log = best_step(state.log), state.log
        if not self._ends_with_best or best in (None, state.step):
            return None
        folder = self.checkpoints.best(best)
        if folder is None:
            return None
        self._load(folder)
        state.log = log
        return best


def _write_models(
    folder: Path, critic_folder: Path, inputs: Inputs, actor: ActorCritic, about: dict[str, Any]
) -> None:
    """Write the policy, and the critic for a later training or a look."""
    tokenizer = inputs.tokenizer
    if actor.critic is not None:
        load = partial(load_critic, settings=inputs.settings)
        save(critic_folder, actor.critic, tokenizer, inputs.critic, about, load=load)
    save(
        folder, actor.policy, tokenizer, inputs.name, about,
        finish=lambda model: generation_ends(model, ends_of(model, tokenizer)),
    )  # fmt: skip


def _summary(
    inputs: Inputs, log: list[dict[str, float]], resumed_from: int, best: int | None
) -> dict[str, Any]:
    evaluations = evals(log)
    by_step = list(evaluations.values())
    steps = [entry for entry in log if "objective/kl" in entry]
    return {
        "from": inputs.name,
        "algorithm": inputs.settings.algorithm,
        "prompts": len(inputs.train),
        "eval_prompts": len(inputs.held_out),
        "dropped": inputs.tokeniser.dropped,
        "steps": int(log[-1]["step"]),
        "resumed_from": resumed_from,
        "best_step": best,
        "first": steps[0],
        "last": steps[-1],
        "eval_before": by_step[0] if by_step else None,
        "eval_after": evaluations.get(best, by_step[-1]) if by_step else None,
    }
