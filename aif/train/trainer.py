"""`transformers.Trainer` on prepared steps; it stops at once and resumes exactly.

The Trainer's data set is the run's optimizer steps (`batch.Steps`), and its model's forward is the
summed loss of one micro-batch. `_Guide` decides when to evaluate, save and stop.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from aif.config.settings import TrainSettings
from aif.errors import AifError, Interrupted
from aif.models.load import torch_dtype, usable_device
from aif.progress import Progress
from aif.run import Run
from aif.signals import handling
from aif.train.batch import Layouts, OptimizerStep, Steps
from aif.train.distributed import any_rank
from aif.train.metrics import Metrics
from aif.train.model import learning_rate
from aif.train.resume import SCHEDULES, Checkpoints


@dataclass
class Training:
    """All inputs of a training, and where it reports."""

    stage: str
    model: Any  # its forward gives the summed loss of a batch
    steps: Steps
    held_out: OptimizerStep | None  # the held-out rows
    settings: TrainSettings
    checkpoints: Path
    about: dict[str, Any]  # stored in every checkpoint; a run resumes only from an equal one
    metrics: Metrics
    progress: Progress
    stop: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def of(
        cls, run: Run, stage: str, settings: TrainSettings, model: Any, layout: Layouts,
        rows: Sequence[Any], held_out: Sequence[Any], about: dict[str, Any], progress: Progress,
    ) -> Training:  # fmt: skip
        """The training of a run's stage on `rows`, weighted by `settings.data`, with evaluation on
        `held_out`."""
        steps = Steps(
            rows, settings.data, layout, batch_size=settings.batch_size, epochs=settings.epochs,
            max_steps=settings.max_steps, seed=settings.seed,
        )  # fmt: skip
        evaluated = layout.step(held_out) if held_out else None
        folder = run.file("checkpoints") / stage
        metrics = Metrics(run, stage)
        return cls(stage, model, steps, evaluated, settings, folder, about, metrics, progress)


@dataclass(frozen=True)
class Trained:
    """The results of a training, with the names of a stage's summary."""

    steps: int
    resumed_from: int
    best_step: int | None
    train_loss: float  # mean over steps
    eval_loss_before: float | None
    eval_loss: float | None  # of the weights that the model ends with
    tokens_per_s: float | None  # real tokens, without padding, in this process

    def summary(self) -> dict[str, Any]:
        return asdict(self)


def train(training: Training) -> Trained:
    """Train to the end, from the newest whole checkpoint if there is one.

    Raises Interrupted when a signal stops it, after a checkpoint of the current step; the same call
    resumes from it, bit for bit on a CPU. Without a checkpoint, the metrics and checkpoints of an
    earlier training are replaced.
    """
    trainer = StepTrainer(training)
    resume = trainer.checkpoints.newest()
    try:
        with stopping(training.stop, training.progress):
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    except torch.OutOfMemoryError as error:
        raise AifError(
            f"{training.stage}: out of memory; {training.stage}.micro_tokens = "
            f"{training.steps.layout.micro_tokens // 2} takes about half, "
            "gradient_checkpointing = true less; the same command resumes"
        ) from error
    finally:
        training.progress.finish()
    log, state = trainer.state.log_history, trainer.state
    training.metrics.put(trainer.rows(), now=True)
    if state.global_step < len(training.steps):
        raise Interrupted(
            f"interrupted at step {state.global_step:,} of {len(training.steps):,}; "
            "the same command resumes"
        )
    trainer.end_with_best()
    evals = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    losses = [entry["loss"] for entry in log if "loss" in entry]
    return Trained(
        steps=state.global_step,
        resumed_from=trainer.guide.began_at,
        best_step=state.best_global_step,
        train_loss=sum(losses) / len(losses),
        eval_loss=evals.get(state.best_global_step or state.global_step),
        eval_loss_before=evals.get(0),
        tokens_per_s=trainer.tokens / trainer.seconds if trainer.seconds else None,
    )


def arguments(training: Training) -> TrainingArguments:
    """The settings under the Trainer's names. It saves, evaluates and logs nothing on its own."""
    settings, steps = training.settings, len(training.steps)
    place = usable_device(settings.device)
    if place.type == "cuda" and place.index is not None:
        torch.cuda.set_device(place)
    trainer_arguments = TrainingArguments(
        output_dir=str(training.checkpoints),
        per_device_train_batch_size=1,
        max_steps=steps,
        learning_rate=learning_rate(settings),
        lr_scheduler_type=SCHEDULES[settings.schedule],
        warmup_steps=math.ceil(settings.warmup_ratio * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_epsilon,
        bf16=torch_dtype(settings.dtype, place) == torch.bfloat16,
        use_cpu=place.type == "cpu",
        seed=settings.seed,
        save_strategy="no",
        eval_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,
        log_level="error",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    if not trainer_arguments.distributed_state.use_distributed:
        # With several GPUs the Trainer would use nn.DataParallel, which cuts rows.
        trainer_arguments._n_gpu = min(trainer_arguments.n_gpu, 1)
    return trainer_arguments


class StepTrainer(Trainer):
    """A Trainer whose items are whole optimizer steps, each of several micro-batches."""

    def __init__(self, training: Training):
        self.training = training
        self.tokens = 0
        self.seconds = 0.0
        self.checkpoints = Checkpoints(
            training.checkpoints, training.about, training.settings, training.progress
        )
        self.guide = _Guide(self)
        super().__init__(
            model=training.model,
            args=arguments(training),
            train_dataset=training.steps,
            data_collator=_only,
            callbacks=[self.guide],
        )
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader:
        """The steps in order: step k is item k, also after a resume."""
        steps = self.training.steps
        return DataLoader(steps, 1, sampler=SequentialSampler(steps), collate_fn=_only)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: the Trainer's estimate assumes one padded batch."""
        return 0

    def _get_num_items_in_batch(
        self, batch_samples: list[OptimizerStep], device: torch.device
    ) -> None:
        """None: an OptimizerStep has its own count."""

    def training_step(
        self, model: Any, inputs: OptimizerStep, num_items_in_batch: Any = None
    ) -> Any:
        """Forward and backward over the step's micro-batches; returns the step's mean loss.

        The loss is divided by the items of the whole step, so it depends neither on padding nor on
        the cut into micro-batches.
        """
        began = time.perf_counter()
        model.train()
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        share = inputs.batches[rank::world]
        loss = torch.zeros((), device=self.args.device)
        # Every process takes part in the backward pass; one without a batch adds nothing.
        for n, batch in enumerate(share or inputs.batches[:1]):
            last = n + 1 >= len(share)
            with nullcontext() if last else self.accelerator.no_sync(model):
                part = model(**batch.inputs(self.args.device)) / inputs.loss_items
                part = part if share else part * 0
                self.accelerator.backward(part * world)  # gradients are averaged over processes
            loss += part.detach()
        loss = self.accelerator.reduce(loss) if world > 1 else loss
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - began
        self.tokens += inputs.tokens
        return loss

    @torch.no_grad()
    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The mean loss on the held-out rows. Draws no random number."""
        held_out, model = self.training.held_out, self.model_wrapped
        model.eval()
        loss = sum(float(model(**batch.inputs(self.args.device))) for batch in held_out.batches)
        loss /= held_out.loss_items
        metrics = {"eval_loss": loss}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def rows(self) -> list[dict[str, float]]:
        """The log's entries of steps, without the Trainer's own clock."""
        names = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
        kept = [
            {k: e[k] for k in names if k in e and math.isfinite(e[k])}
            for e in self.state.log_history
        ]
        return [entry for entry in kept if len(entry) > 1]

    def end_with_best(self) -> None:
        """Load the weights with the lowest eval loss, unless they are the last weights."""
        best, state = self.state.best_global_step, self.state
        if not self.training.settings.load_best or best in (None, state.global_step):
            state.best_global_step = None if best == state.global_step else best
            return
        folder = self.checkpoints.best(best)
        if folder is None:
            state.best_global_step = None
            return
        state.best_model_checkpoint = str(folder)
        self._load_best_model()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Note the best step and save its weights; the last step's weights are saved anyway."""
        better = self.state.best_metric is None or metrics["eval_loss"] < self.state.best_metric
        if better and self.training.settings.load_best:
            self.state.best_metric = metrics["eval_loss"]
            self.state.best_global_step = self.state.global_step
            if self.state.global_step < self.state.max_steps:
                self.control.should_save = True
        return better

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as the Trainer does and mark it complete; only then may an older one go."""
        with self.checkpoints.saving(self.state.global_step, self.state.best_global_step):
            super()._save_checkpoint(model, trial)


class _Guide(TrainerCallback):
    """Decides when to evaluate, save and stop, and shows the progress."""

    def __init__(self, trainer: StepTrainer):
        self._trainer = trainer
        self._training = trainer.training
        self.began_at = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        training = self._training
        self.began_at = state.global_step
        training.progress.start(training.stage, len(training.steps), done=state.global_step)
        if state.global_step == 0 and training.held_out:
            self._trainer.evaluate()
        self._trainer.checkpoints.saved_at = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        training, step = self._training, state.global_step
        settings, last = training.settings, step >= len(training.steps)
        every = settings.eval_every or training.steps.per_epoch
        control.should_evaluate = bool(training.held_out) and (last or step % every == 0)
        control.should_save = any_rank(self._trainer.checkpoints.due(step)) and not last
        control.should_training_stop = last
        self._heed_stop(state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise AifError(
                f"{self._training.stage}: the loss is {loss} at step {state.global_step}; "
                f"a lower {self._training.stage}.learning_rate may help"
            )
        trainer = self._trainer
        rate = trainer.tokens / max(trainer.seconds, 1e-9)
        note = f"loss {loss:.3f}, {rate:,.0f} tokens/s"
        self._training.progress.update(state.global_step, note=note)
        self._training.metrics.put(trainer.rows())
        self._heed_stop(state, control)

    def _heed_stop(self, state: Any, control: Any) -> None:
        stop = any_rank(self._training.stop.is_set())
        if stop and state.global_step < len(self._training.steps):
            control.should_save = control.should_training_stop = True


@contextmanager
def stopping(event: threading.Event, progress: Progress) -> Iterator[None]:
    """Make SIGINT and SIGTERM set `event`, so that training ends after the current step, with a
    checkpoint.

    The same signal again ends the process at once: checkpoints are valid at every moment. (On
    Ctrl-C a launcher of several processes sends them a SIGTERM after their SIGINT.) Outside the
    main thread signals are left alone.
    """
    received: set[int] = set()

    def stop(number: int, frame: object) -> None:
        if number in received:
            os._exit(Interrupted.exit_code)
        received.add(number)
        if not event.is_set():
            progress.say("stopping after this step; again to leave at once")
        event.set()

    with handling({signal.SIGINT: stop, signal.SIGTERM: stop}):
        yield


def _only(items: Sequence[Any]) -> Any:
    (item,) = items
    return item
