"""Supervised fine-tuning: revisions, demonstrations -> sft/, a model for transformers.

    [sft]
    data = { revisions = 1.0, "demonstrations.jsonl" = 0.5 }

The policy learns each response's tokens and its end, nothing else (`tokens`); with objective = "lm"
it learns every token of plain texts. A run that is stopped and started again ends with the same
bits (`trainer`). A finished run is not repeated unless its data, settings or model have changed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from aif.config.settings import SFTSettings
from aif.progress import Progress
from aif.run import Run
from aif.train.batch import Layout
from aif.train.distributed import ends_process_group
from aif.train.examples import Example, mirror_mixture, read_examples, split
from aif.train.logprobs import nll_loss
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
from aif.train.tokens import TokenRow, blocks, check_any, token_digest, tokeniser_of
from aif.train.trainer import Trained, Training, train

STAGE = "sft"


class SFTData:
    """The data of a run's SFT in tokens, to train on and held out; reads no weights."""

    def __init__(self, run: Run, name: str):
        """`name` is the model to start from. Raises what `read_examples` raises, and AifError if no
        example fits into `sft.max_tokens`."""
        settings = run.settings.sft
        self.tokeniser = tokeniser_of(run, name, settings.max_tokens, loss_on=settings.loss_on)
        examples = read_examples(run)
        self.duplicates = examples.duplicates
        self.train_examples, tests = split(examples.rows, settings)
        self.eval_examples = mirror_mixture(tests, settings)
        self.train = self._tokens(self.train_examples, settings)
        self.held_out = self._tokens(self.eval_examples, settings)
        check_any(STAGE, self.train, f"{len(examples.rows):,} examples", self.tokeniser)

    def _tokens(self, examples: Sequence[Example], settings: SFTSettings) -> list[TokenRow]:
        if settings.objective == "lm":
            tokenizer, length = self.tokeniser.tokenizer, self.tokeniser.max_tokens
            return list(blocks(tokenizer, examples, length, settings.seed))
        return list(self.tokeniser.dialogues(examples))


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
        data = SFTData(run, name)
        run.keep_settings()
        tokens = token_digest(data.train), token_digest(data.held_out)
        about = {"digest": digest_of(STAGE, settings, name, *tokens)}
        if last := done_before(run, STAGE, folder, about, progress):
            return last
        model = load_for_training(name, settings)
        tokenizer = data.tokeniser.tokenizer
        most, call = micro_batch(model, settings)
        layout = Layout(most, packs(model, settings), tokenizer.pad_token_id, call)
        training = Training.of(
            run, STAGE, settings, model, layout, data.train, data.held_out, about, progress
        )
        with forward_is(inner(model), nll_loss(inner(model))):
            trained = train(training)
        if not run.leads:
            return about
        save(
            folder, model, tokenizer, name, about,
            finish=lambda model: generation_ends(model, data.tokeniser.ends),
        )  # fmt: skip
        summary = about | _summary(run, name, data, training, trained)
        run.write_state(STAGE, summary)
    return summary


def _summary(
    run: Run, name: str, data: SFTData, training: Training, trained: Trained
) -> dict[str, Any]:
    loss = trained.eval_loss
    return {
        "run": str(run.path),
        "model": str(run.file(STAGE)),
        "from": name,
        "examples": len(data.train_examples),
        "by_source": dict(Counter(example.source for example in data.train_examples)),
        "duplicates": sum(data.duplicates.values()),
        "eval_examples": len(data.eval_examples),
        "truncated": data.tokeniser.truncated,
        "dropped": data.tokeniser.dropped,
        "train_tokens": sum(map(len, data.train)),
        "eval_tokens": training.held_out.tokens if training.held_out else 0,
        **trained.summary(),
        "perplexity": None if loss is None else math.exp(loss),
    }
