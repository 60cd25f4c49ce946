"""Log-probabilities and the loss of a language model, only for the learned tokens.

A response is often a third of its sequence, and logits are large: half a megabyte a position in
float32 with a vocabulary of 128,000. So the body runs over the whole sequence, but the head only
over the positions before a learned token, in chunks whose logits are computed again in the backward
pass. [B, T, V] never exists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_BYTES = 1 << 28  # of one chunk in float32


class TokenLogprobs(NamedTuple):
    """Log-probabilities of N target tokens under a model, in float32."""

    logprobs_N: torch.Tensor  # log p of each target
    entropy_N: torch.Tensor | None  # of the distribution of each target, in nats


class LearnedTokens(NamedTuple):
    """The N learned tokens of a batch, row by row."""

    hidden_ND: torch.Tensor  # the hidden state that predicts each
    targets_N: torch.Tensor  # their ids


def token_logprobs(
    head: Any,
    hidden_ND: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
) -> TokenLogprobs:
    """Log-probabilities, and entropies if wanted, at a temperature; `head` maps [n, D] to logits
    [n, V]."""

    def part(hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> TokenLogprobs:
        logits_NV = head(hidden_ND).float()
        logits_NV = logits_NV if temperature == 1.0 else logits_NV / temperature
        logprobs_N = -F.cross_entropy(logits_NV, targets_N, reduction="none")
        return TokenLogprobs(logprobs_N, _entropy(logits_NV) if entropy else None)

    vocabulary = getattr(head, "out_features", None) or head.weight.shape[0]
    rows = max(1, LOGITS_BYTES // (4 * vocabulary))
    if len(targets_N) <= rows:
        return part(hidden_ND, targets_N)
    parts = [
        checkpoint(part, hidden, targets, use_reentrant=False)
        for hidden, targets in zip(hidden_ND.split(rows), targets_N.split(rows), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return TokenLogprobs(torch.cat(logprobs), torch.cat(entropies) if entropy else None)


def _entropy(logits_NV: torch.Tensor) -> torch.Tensor:
    logprobs_NV = logits_NV.log_softmax(-1)
    return -(logprobs_NV.exp() * logprobs_NV).sum(-1)


def token_nll(head: Any, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """-log p of each target token, [N], in float32; `head` maps [n, D] to logits [n, V]."""
    return -token_logprobs(head, hidden_ND, targets_N).logprobs_N


def learned(
    hidden_BTD: torch.Tensor, input_ids: torch.Tensor, loss_mask: torch.Tensor
) -> LearnedTokens:
    """The tokens under `loss_mask` [B, T], each with the state of the token before it."""
    mask = loss_mask[:, 1:]
    return LearnedTokens(hidden_BTD[:, :-1][mask], input_ids[:, 1:][mask])


def nll_loss(model: Any) -> Callable[..., torch.Tensor]:
    """The loss of a causal language model for `model.forward_is`: the summed -log p of all learned
    tokens of a `batch.Batch`, a scalar.

    A trial detects a model that changes its logits after the head (a soft cap, a scale). For such a
    model all logits are computed at once.
    """
    plain_head = head_is_all(model)

    def loss(
        model: Any,
        input_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        if not plain_head:
            logits_BTV = type(model).forward(model, **inputs).logits
            logits_NV, targets_N = learned(logits_BTV, input_ids, loss_mask)
            return F.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
        hidden_BTD = model.base_model(**inputs).last_hidden_state
        hidden_ND, targets_N = learned(hidden_BTD, input_ids, loss_mask)
        return token_nll(model.get_output_embeddings(), hidden_ND, targets_N).sum()

    return loss


@torch.no_grad()
def head_is_all(model: Any) -> bool:
    """Whether a model's logits are just its head applied to the last hidden state."""
    was_training = model.training
    model.eval()
    ids_BT = torch.arange(4, device=model.device)[None] + 1
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    plain_BTV = model.get_output_embeddings()(hidden_BTD)
    model.train(was_training)
    return torch.allclose(logits_BTV.float(), plain_BTV.float(), rtol=1e-3, atol=1e-3)
