"""Policy and critic in one module, and what they say of responses token by token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch

from aif.train.logprobs import head_is_all, learned, token_logprobs
from aif.train.model import inner
from aif.train.prefix_mask import before, body_inputs

Read = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class ActorCritic(torch.nn.Module):
    """A policy and, unless it is None, a critic: one module to wrap, shard, save and step.

    A value is `scale` times the critic's score less `shift`, so that a critic that begins as the
    reward model begins on the scale of the rewards.
    """

    def __init__(
        self, policy: Any, critic: Any, temperature: float, shift: float = 0.0, scale: float = 1.0
    ):
        super().__init__()
        self.policy, self.critic = policy, critic
        self.temperature, self.shift, self.scale = temperature, shift, scale
        self.head_is_all = head_is_all(inner(policy))

    def forward(
        self,
        input_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        branch: torch.Tensor | None = None,
        entropy: bool = False,
        texts: bool = False,
    ) -> Read | torch.Tensor:
        """(log-probabilities, values, entropies) of the tokens under `loss_mask`, [N] each, row by
        row (see `batch.Batch`); the value is of the state before the token. None where there is no
        critic, or no entropy is wanted.

        Of `texts`, which nobody sampled, the summed -log p at temperature 1, a scalar.
        """
        batch = (input_ids, loss_mask, position_ids, branch)
        if texts:
            return -logprobs_of(
                inner(self.policy), *batch, 1.0, False, self.head_is_all
            )[0].sum()  # fmt: skip
        logprobs_N, entropy_N = logprobs_of(
            inner(self.policy), *batch, self.temperature, entropy, self.head_is_all
        )
        return logprobs_N, self._values(*batch) if self.critic else None, entropy_N

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        """Without what is frozen: under adapters, that is as it was read."""
        found = super().state_dict(*args, prefix=prefix, **kwargs)
        for name, weight in self.named_parameters(remove_duplicate=False):
            if not weight.requires_grad:
                found.pop(prefix + name, None)
        return found

    def _values(
        self,
        input_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        position_ids: torch.Tensor | None,
        branch: torch.Tensor | None,
    ) -> torch.Tensor:
        critic = inner(self.critic)
        inputs = body_inputs(input_ids, position_ids, branch)
        hidden_BTD = critic.base_model(**inputs).last_hidden_state
        hidden_ND, _ = _learned(hidden_BTD, input_ids, loss_mask, branch)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return self.scale * (critic.score(hidden_ND.float()).squeeze(-1) - self.shift)


class Reference:
    """The policy before any training: itself with its adapters off, or a frozen second model."""

    def __init__(self, actor: ActorCritic, frozen: Any = None):
        self._actor, self.frozen = actor, frozen

    @torch.no_grad()
    def logprobs(
        self,
        input_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        branch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `ActorCritic.forward` gives them, at the same temperature (summarize_from_feedback_
        details: a ratio or a KL of two temperatures is of two other distributions)."""
        actor = self._actor
        model = inner(self.frozen or actor.policy)
        kind = _head(model).weight.dtype
        # What the accelerator does for the policy's forward, it does not do for this.
        mixed = nullcontext() if kind == torch.float32 else torch.autocast(model.device.type, kind)
        with mixed, nullcontext() if self.frozen else actor.policy.disable_adapter():
            return logprobs_of(
                model, input_ids, loss_mask, position_ids, branch, actor.temperature, False,
                actor.head_is_all,
            )[0]  # fmt: skip


def logprobs_of(
    model: Any,
    input_ids: torch.Tensor,
    loss_mask: torch.Tensor,
    position_ids: torch.Tensor | None,
    branch: torch.Tensor | None,
    temperature: float,
    entropy: bool,
    head_is_all: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities [N] (and entropies) of the tokens under `loss_mask`; the head runs for
    these alone, in chunks, so that [B, T, V] never exists."""
    inputs = body_inputs(input_ids, position_ids, branch)
    if head_is_all:
        hidden_BTD, head = model.base_model(**inputs).last_hidden_state, _head(model)
    else:  # a soft cap or a scale on the logits: the model's own forward has to make them
        hidden_BTD, head = model(**inputs).logits, torch.nn.Identity()
        head.out_features = hidden_BTD.shape[-1]
    hidden_ND, targets_N = _learned(hidden_BTD, input_ids, loss_mask, branch)
    return token_logprobs(head, hidden_ND, targets_N, temperature, entropy)


def _learned(
    hidden_BTD: torch.Tensor,
    input_ids: torch.Tensor,
    loss_mask: torch.Tensor,
    branch: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`losses.learned`, of rows in branches too."""
    if branch is None:
        return learned(hidden_BTD, input_ids, loss_mask)
    return before(hidden_BTD, branch)[loss_mask], input_ids[loss_mask]


def _head(model: Any) -> Any:
    return model.get_output_embeddings()


def freeze(model: Any, dtype: torch.dtype) -> Any:
    """`model` for inference alone, its linear layers rounded to what autocast would round them to
    at each call: the same numbers to the bit, in half the memory."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not getattr(model, "score", None):
            # A weight of its own: an embedding that is tied to the head stays in float32.
            module.weight = torch.nn.Parameter(module.weight.to(dtype), requires_grad=False)
    return model.eval()


@torch.no_grad()
def merged_weights(policy: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The policy's weights under the names of the plain transformers model, adapters added in."""
    for name, weight in inner(policy).named_parameters():
        if ".lora_" in name:
            continue
        if name.endswith(".base_layer.weight"):
            layer = inner(policy).get_submodule(name.removesuffix(".base_layer.weight"))
            weight = (weight + layer.get_delta_weight("default")).to(weight.dtype)
        yield name.replace(".base_layer.", "."), weight
