"""Supervised fine-tuning: revisions, demonstrations -> sft/, a model that transformers loads.

    [sft]
    data = { revisions = 1.0, "demonstrations.jsonl" = 0.5 }

The policy learns each response's tokens and its end, nothing else (`tokens`); with
objective = "lm" every token of plain texts. Stopped and started again it ends with the same bits
as if it had not been stopped (`trainer`); started again when it is done it does nothing, unless
data, settings or model have changed.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aif.errors import AifError, InputError, shown
from aif.pretrained import load_tokenizer, torch_dtype, usable_device
from aif.progress import Progress
from aif.records import content_id
from aif.run import Run
from aif.settings import SFTSettings
from aif.train import checkpoint
from aif.train.batch import Layout, Step, Steps
from aif.train.dialogues import Example, read_examples, split
from aif.train.losses import forward_is_nll, forward_is_own
from aif.train.metrics import Metrics
from aif.train.model import (
    identity,
    inner,
    learning_rate,
    load_for_training,
    micro_batch,
    packs,
    save,
)
from aif.train.tokens import Tally, Tokeniser, Tokens, blocks, digest
from aif.train.trainer import Trained, Training, train

STAGE = "sft"

# What may be changed in the middle of a run: where and how it is computed, not what.
FREE = {"device", "micro_tokens", "packing", "gradient_checkpointing"}
FREE |= {"save_every", "keep_checkpoints"}


class Prepared:
    """Everything in tokens, before any weight is read."""

    def __init__(self, run: Run, name: str):
        settings = run.settings.sft
        self.tokenizer, context = load_tokenizer(name)
        found = read_examples(run)
        self.train_rows, self.eval_rows = split(found.rows, settings)
        self.duplicates = found.duplicates
        limit = min(settings.max_tokens, context)
        chat = run.settings.policy.form != "text"
        tokeniser = Tokeniser(self.tokenizer, limit, settings.loss_on, chat)
        self.train = self._tokens(self.train_rows, tokeniser, settings)
        self.held_out = self._tokens(self.eval_rows, tokeniser, settings)
        self.tally, self.ends = tokeniser.tally, tokeniser.ends
        if not self.train:
            raise AifError(
                f"sft: none of {len(found.rows):,} examples is left to learn from; "
                f"{self.tally.dropped:,} do not fit into {limit:,} tokens (sft.max_tokens)"
            )

    def _tokens(
        self, rows: Sequence[Example], tokeniser: Tokeniser, settings: SFTSettings
    ) -> list[Tokens]:
        if settings.objective == "lm":
            return list(blocks(self.tokenizer, rows, tokeniser.max_tokens, settings.seed))
        return list(tokeniser.dialogues(rows))


def sft(run: Run, progress: Progress) -> dict[str, Any]:
    """Fine-tune `sft.model` (default: the policy) on `sft.data` into sft/; returns the summary.

    Raises InputError for bad data or settings, Interrupted when a signal stops it.
    """
    settings = run.settings.sft
    name = settings.model or run.settings.policy.model
    folder = run.file(STAGE)
    if Path(name).expanduser().resolve() == folder.resolve():
        raise InputError(
            "sft", "model", got=f"{shown(name)}, what it makes", expected="the model to start from"
        )
    with run.writing(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        prepared = Prepared(run, name)
        run.keep_settings()
        about = {"digest": _digest(settings, prepared, name)}
        last = run.state(STAGE)
        if last.get("digest", about["digest"]) != about["digest"]:
            progress.say("sft: data, settings or model have changed since the last time: anew")
        elif "steps" in last:
            why = checkpoint.fault(folder)
            if why is None and checkpoint.sealed(folder) == about:
                progress.say(f"{folder}: done already, of the same data, settings and model")
                return last
            progress.say(f"{folder}: {why or 'it is of another run'}; it is made again")
        run.write_state(STAGE, {**about, "in_progress": True})
        model = load_for_training(name, settings)
        training = _training(run, model, prepared, about, progress)
        forward_is_nll(inner(model))
        trained = train(training)
        forward_is_own(inner(model))
        save(folder, model, prepared.tokenizer, name, prepared.ends, about)
        summary = about | _summary(run, name, prepared, training, trained)
        run.write_state(STAGE, summary)
    return summary


def _digest(settings: SFTSettings, prepared: Prepared, name: str) -> str:
    """Of everything that the weights at the end depend on."""
    resolved = {
        "model": identity(name),
        "dtype": str(torch_dtype(settings.dtype, usable_device(settings.device))),
        "learning_rate": learning_rate(settings),
    }
    return content_id(
        STAGE,
        settings.model_dump(exclude=FREE) | resolved,
        digest(prepared.train),
        digest(prepared.held_out),
    )


def _training(
    run: Run, model: Any, prepared: Prepared, about: dict[str, Any], progress: Progress
) -> Training:
    settings = run.settings.sft
    most, call = micro_batch(model, settings)
    layout = Layout(most, packs(model, settings), prepared.tokenizer.pad_token_id, call)
    steps = Steps(
        prepared.train,
        settings.data,
        layout,
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        seed=settings.seed,
    )
    held_out = layout.step(prepared.held_out) if prepared.held_out else None
    checkpoints = run.file("checkpoints") / STAGE
    metrics = Metrics(run, STAGE)
    return Training(STAGE, model, steps, held_out, settings, checkpoints, about, metrics, progress)


def _summary(
    run: Run, name: str, prepared: Prepared, training: Training, trained: Trained
) -> dict[str, Any]:
    held_out = training.held_out or Step([], 0, 0)
    tally: Tally = prepared.tally
    loss = trained.eval_loss
    return {
        "run": str(run.path),
        "model": str(run.file(STAGE)),
        "from": name,
        "examples": len(prepared.train_rows),
        "by_source": dict(Counter(row.source for row in prepared.train_rows)),
        "duplicates": sum(prepared.duplicates.values()),
        "eval_examples": len(prepared.eval_rows),
        "truncated": tally.truncated,
        "dropped": tally.dropped,
        "train_tokens": sum(map(len, prepared.train)),
        "eval_tokens": held_out.tokens,
        "steps": trained.steps,
        "resumed_from": trained.resumed_from,
        "best_step": trained.best_step,
        "train_loss": trained.train_loss,
        "eval_loss_before": trained.eval_loss_before,
        "eval_loss": loss,
        "perplexity": None if loss is None else math.exp(loss),
        "tokens_per_s": trained.tokens_per_s,
    }
