"""The data of a PPO step: responses with their logprobs, values, rewards and advantages.

Tensors are [B, T]: B responses, T tokens of the longest, padded on the right with 0.
`response_mask_BT` is True at a response's tokens, its EOS included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import reduce

from aif.config.settings import PPOSettings
from aif.models.decode import SampledTokens
from aif.train.batch import Batch, Layout
from aif.train.ppo.actor_critic import Reference
from aif.train.ppo.maths import gae, kl_estimate, leave_one_out, moments_of, token_rewards, whiten
from aif.train.tokens import TokenRow


@dataclass(frozen=True)
class ModelOutputs:
    """The models' outputs for each response token, at the policy's temperature."""

    logprobs_BT: torch.Tensor  # of the policy that sampled the responses
    ref_logprobs_BT: torch.Tensor
    entropy_BT: torch.Tensor
    values_BT: torch.Tensor | None  # None without a critic

    @property
    def kl_B(self) -> torch.Tensor:
        """log p / p_ref of each response, in nats: the mean estimates the KL divergence."""
        return (self.logprobs_BT - self.ref_logprobs_BT).sum(1)


@dataclass(frozen=True)
class Experience(ModelOutputs):
    """One step's responses with all that the update reads."""

    rows: list[TokenRow]  # prompt and response; loss_mask_T is True at the response
    prompt_ids: list[str]
    response_mask_BT: torch.Tensor
    rewards_BT: torch.Tensor  # scores after KL
    advantages_BT: torch.Tensor
    returns_BT: torch.Tensor | None  # None without a critic


def tokens_of(prompt_T: np.ndarray, response: SampledTokens) -> TokenRow:
    """A prompt with its response; the loss mask keeps the response."""
    ids_T = np.concatenate([prompt_T, response.ids]).astype(np.int32)
    return TokenRow(ids_T, np.arange(len(ids_T)) >= len(prompt_T), "rollout")


def response_mask(rows: Sequence[TokenRow]) -> torch.Tensor:
    """[B, T], True at each row's response tokens."""
    lengths_B = torch.tensor([int(row.loss_mask_T.sum()) for row in rows])
    return torch.arange(int(lengths_B.max())) < lengths_B[:, None]


def micro_batches(rows: Sequence[TokenRow], layout: Layout) -> Iterator[tuple[list[int], Batch]]:
    """(indices of the rows, the rows as a batch); rows of similar lengths are together."""
    number = {id(row): n for n, row in enumerate(rows)}
    for group, batch in layout.batches(rows):
        yield [number[id(row)] for row in group], batch


@torch.no_grad()
def compute_logprobs(
    rows: Sequence[TokenRow],
    model: Any,
    reference: Reference,
    layout: Layout,
    device: torch.device,
) -> ModelOutputs:
    """One forward of the model (an ActorCritic) and of the reference over the responses."""
    mask_BT = response_mask(rows).to(device)
    outputs = {
        name: torch.zeros(mask_BT.shape, device=device)
        for name in ("logprobs", "ref_logprobs", "entropy", "values")
    }
    model.eval()
    for numbers, batch in micro_batches(rows, layout):
        inputs = batch.inputs(device)
        logprobs_N, values_N, entropy_N = model(**inputs, entropy=True)
        parts = {"logprobs": logprobs_N, "values": values_N, "entropy": entropy_N}
        parts["ref_logprobs"] = reference.logprobs(**inputs)
        for name, part_N in parts.items():
            if part_N is None:
                outputs[name] = None
                continue
            # The tokens come row by row in the batch's order, which is not the order of `rows`.
            part_BT = outputs[name][numbers]
            part_BT[mask_BT[numbers]] = part_N.float()
            outputs[name][numbers] = part_BT
    return ModelOutputs(**{f"{name}_BT": output for name, output in outputs.items()})


def compute_rewards(
    scores_B: torch.Tensor,
    outputs: ModelOutputs,
    response_mask_BT: torch.Tensor,
    kl_coef: float,
    settings: PPOSettings,
) -> torch.Tensor:
    """Rewards [B, T]: -kl_coef * KL at each token, and the score at the last token."""
    kl_BT = kl_estimate(outputs.logprobs_BT, outputs.ref_logprobs_BT, settings.kl_estimator)
    rewards_BT = token_rewards(scores_B, kl_BT, response_mask_BT, kl_coef)
    if settings.whiten_rewards:
        rewards_BT = _whiten(rewards_BT, response_mask_BT, shift_mean=False)
    return rewards_BT


def compute_advantages(
    rewards_BT: torch.Tensor,
    values_BT: torch.Tensor | None,
    response_mask_BT: torch.Tensor,
    prompt_ids: Sequence[str],
    settings: PPOSettings,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(advantages [B, T], returns [B, T]); there are no returns without a critic."""
    if settings.algorithm == "ppo":
        advantages_BT, returns_BT = gae(
            rewards_BT, values_BT, response_mask_BT, settings.gamma, settings.lam
        )
        return _whiten(advantages_BT, response_mask_BT), returns_BT
    # REINFORCE and RLOO: the whole response is one action (2402.14740).
    reward_B = rewards_BT.sum(1)
    if settings.algorithm == "rloo":
        number = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompt_ids))}
        group_B = torch.tensor([number[prompt] for prompt in prompt_ids], device=reward_B.device)
        reward_B = leave_one_out(reward_B, group_B)
    return reward_B[:, None] * response_mask_BT, None


def _whiten(
    values_BT: torch.Tensor, mask_BT: torch.Tensor, shift_mean: bool = True
) -> torch.Tensor:
    """`whiten` with the moments of all processes (detail 12)."""
    moments = reduce(moments_of(values_BT, mask_BT), "sum")
    return whiten(values_BT, mask_BT, shift_mean, moments)
