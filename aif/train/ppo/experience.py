"""What a step learns from: responses with their log-probabilities, values, rewards, advantages.

Tensors are [B, T], T the longest response in tokens, padded on the right; `mask_BT` is True at a
response's tokens, its EOS among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aif.config.settings import PPOSettings
from aif.models.decode import SampledTokens
from aif.train.batch import Batch, Layout
from aif.train.ppo.actor_critic import Reference
from aif.train.ppo.maths import gae, kl_estimate, leave_one_out, moments_of, token_rewards, whiten
from aif.train.tokens import TokenRow

Reduce = Callable[[torch.Tensor], torch.Tensor]  # the sum over all processes


@dataclass(frozen=True)
class Experience:
    """One step's responses, all that is known of them, and what each token is to learn."""

    rows: list[TokenRow]  # prompt and response, loss_mask True at the response
    prompts: list[str]  # their ids, one a row
    mask_BT: torch.Tensor
    logprobs_BT: torch.Tensor  # of the policy that drew them, at the temperature of the draw
    ref_logprobs_BT: torch.Tensor
    entropy_BT: torch.Tensor
    values_BT: torch.Tensor | None
    rewards_BT: torch.Tensor
    advantages_BT: torch.Tensor
    returns_BT: torch.Tensor | None

    @property
    def kl_B(self) -> torch.Tensor:
        """log p / p_ref of each response, in nats: its mean estimates the KL divergence."""
        return (self.logprobs_BT - self.ref_logprobs_BT).sum(1)


def tokens_of(prompt_T: np.ndarray, response: SampledTokens) -> TokenRow:
    """A prompt with its response, which alone is learned."""
    ids_T = np.concatenate([prompt_T, response.ids]).astype(np.int32)
    return TokenRow(ids_T, np.arange(len(ids_T)) >= len(prompt_T), "rollout")


def response_mask(rows: Sequence[TokenRow]) -> torch.Tensor:
    """[B, T], True at each row's response tokens, pads on the right."""
    lengths_B = torch.tensor([int(row.loss_mask_T.sum()) for row in rows])
    return torch.arange(int(lengths_B.max())) < lengths_B[:, None]


def micro_batches(rows: Sequence[TokenRow], layout: Layout) -> Iterator[tuple[list[int], Batch]]:
    """(numbers of the rows, the rows in memory), of like lengths together."""
    number = {id(row): n for n, row in enumerate(rows)}
    for group, batch in layout.batches(rows):
        yield [number[id(row)] for row in group], batch


@torch.no_grad()
def read(
    rows: Sequence[TokenRow],
    model: Any,
    reference: Reference,
    layout: Layout,
    device: torch.device,
) -> dict[str, torch.Tensor | None]:
    """Log-probabilities, entropies and values of the model, and log-probabilities of the
    reference, each [B, T]; `values` is None without a critic."""
    mask_BT = response_mask(rows).to(device)
    found = {
        name: torch.zeros(mask_BT.shape, device=device)
        for name in ("logprobs", "values", "entropy", "ref_logprobs")
    }
    model.eval()
    for numbers, batch in micro_batches(rows, layout):
        inputs = batch.inputs(device)
        logprobs_N, values_N, entropy_N = model(**inputs, entropy=True)
        parts = {"logprobs": logprobs_N, "values": values_N, "entropy": entropy_N}
        parts["ref_logprobs"] = reference.logprobs(**inputs)
        for name, part_N in parts.items():
            if part_N is None:
                found[name] = None
            else:
                # Row by row in the batch's order, which is not the order of the rows.
                some_BT = found[name][numbers]
                some_BT[mask_BT[numbers]] = part_N.float()
                found[name][numbers] = some_BT
    return found


def experience(
    rows: list[TokenRow],
    prompts: list[str],
    scores_B: torch.Tensor,
    told: dict[str, torch.Tensor | None],
    settings: PPOSettings,
    kl_coef: float,
    reduce: Reduce,
) -> Experience:
    """Rewards and advantages of responses whose scores are `scores_B`; `prompts` are the ids of
    what they answer, `told` is what `read` found."""
    logprobs_BT, ref_logprobs_BT, values_BT = (
        told[name] for name in ("logprobs", "ref_logprobs", "values")
    )
    mask_BT = response_mask(rows).to(scores_B.device)
    kl_BT = kl_estimate(logprobs_BT, ref_logprobs_BT, settings.kl_estimator)
    rewards_BT = token_rewards(scores_B, kl_BT, mask_BT, kl_coef)
    if settings.whiten_rewards:
        moments = reduce(moments_of(rewards_BT, mask_BT))
        rewards_BT = whiten(rewards_BT, mask_BT, shift_mean=False, moments=moments)
    returns_BT = None
    if settings.algorithm == "ppo":
        advantages_BT, returns_BT = gae(
            rewards_BT, values_BT, mask_BT, settings.gamma, settings.lam
        )
        advantages_BT = whiten(
            advantages_BT, mask_BT, moments=reduce(moments_of(advantages_BT, mask_BT))
        )
    else:
        # One action: the whole response, as REINFORCE and RLOO have it (2402.14740).
        reward_B = rewards_BT.sum(1)
        if settings.algorithm == "rloo":
            number = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts))}
            group_B = torch.tensor([number[prompt] for prompt in prompts], device=reward_B.device)
            reward_B = leave_one_out(reward_B, group_B)
        advantages_BT = reward_B[:, None] * mask_BT
    return Experience(
        rows, prompts, mask_BT, logprobs_BT, ref_logprobs_BT, told["entropy"], values_BT,
        rewards_BT, advantages_BT, returns_BT,
    )  # fmt: skip
