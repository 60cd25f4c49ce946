"""Policy and critic in one module, and their outputs for each token of the responses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from aif.train.logprobs import head_is_all, learned, token_logprobs
from aif.train.model import inner
from aif.train.prefix_mask import before, body_inputs

Inputs = torch.Tensor | None  # one of the fields of `Batch.inputs`


class TokenOutputs(NamedTuple):
    """Outputs for the N tokens that the loss mask keeps, row by row as in the batch."""

    logprobs_N: torch.Tensor
    values_N: torch.Tensor | None  # of the state before the token; None without a critic
    entropy_N: torch.Tensor | None  # in nats; None unless `entropy` is True


class ActorCritic(torch.nn.Module):
    """A policy and a critic (or None) in one module to wrap, shard, save and step.

    A value is `scale * (critic's score - shift)`: a critic that starts as the reward model then
    starts on the scale of the rewards.
    """

    def __init__(
        self, policy: Any, critic: Any, temperature: float, shift: float = 0.0, scale: float = 1.0
    ):
        super().__init__()
        self.policy, self.critic = policy, critic
        self.temperature, self.shift, self.scale = temperature, shift, scale
        self.head_is_all = head_is_all(inner(policy))

    def forward(
        self, entropy: bool = False, texts: bool = False, **batch: Inputs
    ) -> TokenOutputs | torch.Tensor:
        """The outputs of the response tokens of a batch (`Batch.inputs`).

        With `texts` (of ptx, not sampled): the sum of -log p at temperature 1, a scalar.
        """
        policy, temperature = inner(self.policy), 1.0 if texts else self.temperature
        logprobs_N, entropy_N = logprobs_of(
            policy, temperature, self.head_is_all, entropy=entropy, **batch
        )
        if texts:
            return -logprobs_N.sum()
        return TokenOutputs(logprobs_N, self._values(**batch) if self.critic else None, entropy_N)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        """Without frozen weights: under adapters they are as they were loaded."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        for name, weight in self.named_parameters(remove_duplicate=False):
            if not weight.requires_grad:
                state.pop(prefix + name, None)
        return state

    def _values(self, **batch: Inputs) -> torch.Tensor:
        critic = inner(self.critic)
        hidden_BTD = critic.base_model(**_body_inputs(**batch)).last_hidden_state
        hidden_ND, _ = _predicting(hidden_BTD, **batch)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return self.scale * (critic.score(hidden_ND.float()).squeeze(-1) - self.shift)


class Reference:
    """The policy before training: itself with its adapters off, or a frozen second model."""

    def __init__(self, actor: ActorCritic, frozen: Any = None):
        self._actor, self.frozen = actor, frozen

    @torch.no_grad()
    def logprobs(self, **batch: Inputs) -> torch.Tensor:
        """Log-probabilities [N] of the response tokens at the policy's temperature: a ratio or a
        KL at two temperatures would compare other distributions (detail 3)."""
        actor = self._actor
        model = inner(self.frozen or actor.policy)
        kind = _head(model).weight.dtype
        # The accelerator wraps the policy's forward in autocast, but not this one.
        mixed = nullcontext() if kind == torch.float32 else torch.autocast(model.device.type, kind)
        with mixed, nullcontext() if self.frozen else actor.policy.disable_adapter():
            return logprobs_of(model, actor.temperature, actor.head_is_all, **batch)[0]


def logprobs_of(
    model: Any, temperature: float, head_is_all: bool, *, entropy: bool = False, **batch: Inputs
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities [N] of the response tokens of a batch, and entropies [N] if `entropy`.

    The head runs in chunks and only for these tokens, so [B, T, V] never exists.
    """
    inputs = _body_inputs(**batch)
    if head_is_all:
        hidden_BTD, head = model.base_model(**inputs).last_hidden_state, _head(model)
    else:  # the logits have a soft cap or a scale: the model's own forward makes them
        hidden_BTD, head = model(**inputs).logits, torch.nn.Identity()
        head.out_features = hidden_BTD.shape[-1]
    hidden_ND, targets_N = _predicting(hidden_BTD, **batch)
    return token_logprobs(head, hidden_ND, targets_N, temperature, entropy)


def _body_inputs(
    input_ids: torch.Tensor, position_ids: Inputs = None, branch: Inputs = None, **_: Inputs
) -> dict[str, Any]:
    return body_inputs(input_ids, position_ids, branch)


def _predicting(
    hidden_BTD: torch.Tensor,
    input_ids: torch.Tensor,
    loss_mask: torch.Tensor,
    branch: Inputs = None,
    **_: Inputs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the hidden states [N, D] that predict the response tokens, these tokens [N])."""
    if branch is None:
        return learned(hidden_BTD, input_ids, loss_mask)
    return before(hidden_BTD, branch)[loss_mask], input_ids[loss_mask]


def _head(model: Any) -> Any:
    return model.get_output_embeddings()


def freeze(model: Any, dtype: torch.dtype) -> Any:
    """`model` for inference only, its linear layers rounded to `dtype`.

    Autocast rounds them to the same numbers at each call; this needs half the memory.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not getattr(model, "score", None):
            # A new weight: an embedding that is tied to the head stays in float32.
            module.weight = torch.nn.Parameter(module.weight.to(dtype), requires_grad=False)
    return model.eval()


@torch.no_grad()
def merged_weights(policy: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The policy's weights, named as in the plain transformers model, with adapters merged."""
    for name, weight in inner(policy).named_parameters():
        if ".lora_" in name:
            continue
        if name.endswith(".base_layer.weight"):
            layer = inner(policy).get_submodule(name.removesuffix(".base_layer.weight"))
            weight = (weight + layer.get_delta_weight("default")).to(weight.dtype)
        yield name.replace(".base_layer.", "."), weight
