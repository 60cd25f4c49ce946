"""How far a policy has moved from another: log p / p_ref of its own responses, in nats.

Its mean over responses that the policy drew is the estimate k1 of the KL divergence: unbiased, and
for a single response of either sign. The texts are tokenised again, so where a model did not spell
a text as its tokenizer does, it is the KL of the tokenizer's spelling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from aif.config.settings import Settings
from aif.models.load import load_model, load_tokenizer
from aif.store.records import Message
from aif.train.batch import Layout
from aif.train.examples import Example
from aif.train.logprobs import head_is_all
from aif.train.model import micro_batch
from aif.train.ppo.actor_critic import logprobs_of
from aif.train.ppo.experience import micro_batches
from aif.train.tokens import Tokeniser, TokenRow


@dataclass(frozen=True, slots=True)
class Drawn:
    """A response as its policy drew it; `ended` where the policy itself ended it."""

    prompt: list[Message]
    text: str
    ended: bool


def log_ratios(
    drawn: Sequence[tuple[str, Sequence[Drawn]]], reference: str, settings: Settings
) -> list[list[float | None]]:
    """log p / p_ref of every response of each (model, responses), at the temperature they were
    drawn at.

    A model with another vocabulary than `reference` has none, as the same text is then other
    tokens; nor has a response that does not fit into the context. One model is held at a time.
    """
    vocabulary = load_tokenizer(reference)[0].get_vocab()
    rows = [_tokens(name, responses, vocabulary, settings) for name, responses in drawn]
    fit = [[row for row in found if row is not None] for found in rows]
    # Of a model against itself there is nothing to read.
    moved = [name != reference and bool(some) for (name, _), some in zip(drawn, fit, strict=True)]
    every = [row for some, read in zip(fit, moved, strict=True) if read for row in some]
    of_reference = iter(response_logprobs(reference, every, settings) if every else ())
    ratios = []
    for (name, _), found, some, read in zip(drawn, rows, fit, moved, strict=True):
        own = response_logprobs(name, some, settings) if read else ()
        told = iter([p - next(of_reference) for p in own] if read else [0.0] * len(some))
        ratios.append([None if row is None else next(told) for row in found])
    return ratios


def _tokens(
    name: str, responses: Sequence[Drawn], vocabulary: dict[str, int], settings: Settings
) -> list[TokenRow | None]:
    """Each prompt with its response, which alone is read."""
    tokenizer, context = load_tokenizer(name)
    if tokenizer.get_vocab() != vocabulary:
        return [None] * len(responses)
    tokeniser = Tokeniser(tokenizer, context, chat=settings.policy.form != "text")
    talks = ([*row.prompt, {"role": "assistant", "content": row.text}] for row in responses)
    examples = [
        [Example("", "", "", talk, ended=row.ended)]
        for talk, row in zip(talks, responses, strict=True)
    ]
    return [None if found is None else found[0] for found in tokeniser.answers(examples)]


@torch.no_grad()
def response_logprobs(name: str, rows: Sequence[TokenRow], settings: Settings) -> list[float]:
    """The log-probability of every row's response under the model of that name, in nats."""
    policy = settings.policy
    # In float32 unless told otherwise: small differences are summed over hundreds of tokens.
    dtype = "float32" if policy.dtype == "auto" else policy.dtype
    model = load_model(name, dtype, policy.device)
    most, call = micro_batch(model, settings.ppo)
    layout = Layout(most, False, 0, call)
    whole = head_is_all(model)
    found = [0.0] * len(rows)
    for numbers, batch in micro_batches(rows, layout):
        inputs = batch.inputs(model.device)
        logprobs_N, _ = logprobs_of(
            model, **inputs, temperature=policy.temperature, entropy=False, head_is_all=whole
        )
        lengths = inputs["loss_mask"].sum(1).tolist()
        for number, part in zip(numbers, logprobs_N.double().split(lengths), strict=True):
            found[number] = float(part.sum())
    return found
