"""The KL of a policy from a reference, estimated by log p / p_ref of the policy's own responses.

The mean over responses is the estimate k1 in nats (Schulman, "Approximating KL Divergence"): it is
unbiased, and one response may be negative. The texts are tokenised again, so this is the KL of the
tokenizer's spelling, even if the model used other tokens for the same text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aif.config.settings import Settings
from aif.models.load import load_model, load_tokenizer
from aif.train.batch import Layout
from aif.train.examples import Example
from aif.train.logprobs import head_is_all
from aif.train.model import micro_batch
from aif.train.ppo.actor_critic import logprobs_of
from aif.train.ppo.experience import micro_batches
from aif.train.tokens import Tokeniser, TokenRow


def log_ratios(
    policies: Sequence[tuple[str, Sequence[Example]]], reference: str, settings: Settings
) -> list[list[float | None]]:
    """log p / p_ref in nats of every response of each (model, its prompts with responses), at the
    policy's temperature.

    None if the model's vocabulary is not the reference's (the same text is then other tokens), or
    if a response does not fit into the context. One model is in memory at a time.
    """
    vocabulary = load_tokenizer(reference)[0].get_vocab()
    names = [name for name, _ in policies]
    rows = [_tokenise(name, examples, vocabulary, settings) for name, examples in policies]
    fit = [[row for row in model_rows if row is not None] for model_rows in rows]
    # The reference has a KL of zero from itself, so its responses are not read.
    moved = [kept for name, kept in zip(names, fit, strict=True) if name != reference]
    others = [row for kept in moved for row in kept]
    ref_logprobs = iter(response_logprobs(reference, others, settings))
    ratios = []
    for name, model_rows, kept in zip(names, rows, fit, strict=True):
        if name == reference:
            ratios.append([None if row is None else 0.0 for row in model_rows])
            continue
        logprobs = iter(response_logprobs(name, kept, settings))
        ratios.append(
            [None if row is None else next(logprobs) - next(ref_logprobs) for row in model_rows]
        )
    return ratios


def _tokenise(
    name: str, examples: Sequence[Example], vocabulary: dict[str, int], settings: Settings
) -> list[TokenRow | None]:
    """Each prompt with its response; the loss mask keeps the response."""
    tokenizer, context = load_tokenizer(name)
    if tokenizer.get_vocab() != vocabulary:
        return [None] * len(examples)
    tokeniser = Tokeniser(tokenizer, context, chat=settings.policy.form != "text")
    groups = tokeniser.answers([[example] for example in examples])
    return [None if group is None else group[0] for group in groups]


@torch.no_grad()
def response_logprobs(name: str, rows: Sequence[TokenRow], settings: Settings) -> list[float]:
    """The log-probability in nats of each row's response under the model `name`."""
    if not rows:
        return []
    policy = settings.policy
    # float32 by default: small differences are summed over hundreds of tokens.
    dtype = "float32" if policy.dtype == "auto" else policy.dtype
    model = load_model(name, dtype, policy.device)
    micro_tokens, call_tokens = micro_batch(model, settings.ppo)
    layout = Layout(micro_tokens, False, 0, call_tokens)
    whole = head_is_all(model)
    logprobs = [0.0] * len(rows)
    for numbers, batch in micro_batches(rows, layout):
        inputs = batch.inputs(model.device)
        logprobs_N, _ = logprobs_of(
            model, **inputs, temperature=policy.temperature, entropy=False, head_is_all=whole
        )
        lengths = inputs["loss_mask"].sum(1).tolist()
        for number, part_N in zip(numbers, logprobs_N.double().split(lengths), strict=True):
            logprobs[number] = float(part_N.sum())
    return logprobs
