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
from collections import Counter
from collections.abc import Sequence
from typing import Any

from aif.config.settings import SFTSettings
from aif.errors import AifError
from aif.models.load import load_tokenizer
from aif.progress import Progress
from aif.run import Run
from aif.train.batch import Layout, OptimizerStep, Steps
from aif.train.distributed import ends_process_group
from aif.train.examples import Example, read_examples, split
from aif.train.logprobs import nll_loss
from aif.train.metrics import Metrics
from aif.train.model import (
    forward_is,
    generation_ends,
    inner,
    load_for_training,
    micro_batch,
    packs,
    save,
)
from aif.train.resume import check_start, digest_of, done_before, training_in
from aif.train.tokens import Tokeniser, TokenRow, blocks, digest
from aif.train.trainer import Trained, Training, train

STAGE = "sft"


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
        self.tokeniser = tokeniser
        if not self.train:
            raise AifError(
                f"sft: none of {len(found.rows):,} examples is left to learn from; "
                f"{tokeniser.dropped:,} do not fit into {limit:,} tokens (sft.max_tokens)"
            )

    def _tokens(
        self, rows: Sequence[Example], tokeniser: Tokeniser, settings: SFTSettings
    ) -> list[TokenRow]:
        if settings.objective == "lm":
            return list(blocks(self.tokenizer, rows, tokeniser.max_tokens, settings.seed))
        return list(tokeniser.dialogues(rows))


@ends_process_group
def sft(run: Run, progress: Progress) -> dict[str, Any]:
    """Fine-tune `sft.model` (default: the policy) on `sft.data` into sft/; returns the summary.

    Raises InputError for bad data or settings, Interrupted when a signal stops it.
    """
    settings = run.settings.sft
    name = settings.model or run.settings.policy.weights
    folder = run.file(STAGE)
    check_start(STAGE, name, folder)
    with training_in(run):
        prepared = Prepared(run, name)
        run.keep_settings()
        found = digest(prepared.train), digest(prepared.held_out)
        about = {"digest": digest_of(STAGE, settings, name, *found)}
        if last := done_before(run, STAGE, folder, about, progress):
            return last
        model = load_for_training(name, settings)
        training = _training(run, model, prepared, about, progress)
        with forward_is(inner(model), nll_loss(inner(model))):
            trained = train(training)
        if not run.leads:
            return about
        save(
            folder, model, prepared.tokenizer, name, about,
            finish=lambda model: generation_ends(model, prepared.tokeniser.ends),
        )  # fmt: skip
        summary = about | _summary(run, name, prepared, training, trained)
        run.write_state(STAGE, summary)
    return summary


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
    held_out = training.held_out or OptimizerStep([], 0, 0)
    loss = trained.eval_loss
    return {
        "run": str(run.path),
        "model": str(run.file(STAGE)),
        "from": name,
        "examples": len(prepared.train_rows),
        "by_source": dict(Counter(row.source for row in prepared.train_rows)),
        "duplicates": sum(prepared.duplicates.values()),
        "eval_examples": len(prepared.eval_rows),
        "truncated": prepared.tokeniser.truncated,
        "dropped": prepared.tokeniser.dropped,
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
