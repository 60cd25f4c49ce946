"""The arithmetic of PPO (1707.06347) on language models: rewards, advantages and losses of tokens.

B sequences of T response tokens (actions). A mask is True at real tokens. Padding is on the right,
but there may be gaps between real tokens too. Numbers where the mask is False, even nan, reach no
result and no gradient. `values_BT[:, t]` is the critic's value of the state before action t.
Log-probabilities, rewards and values are float32; KL is in nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

LOG_RATIO_LIMIT = 20.0  # detail 16 (OpenRLHF, verl): exp() of it stays finite
KL_STEP_LIMIT = 0.2  # detail 10 (lm-human-preferences, verl)

KLKind = Literal["k1", "k2", "k3"]


def moments_of(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(count, sum, sum of squares) [3] of the values where `mask` is True, for `whiten`.

    The moments of several processes add up. They are float64, because the variance is a small
    difference of large sums.
    """
    kept = values.detach().masked_fill(~mask, 0).double()
    return torch.stack([mask.sum().double(), kept.sum(), kept.square().sum()])


def whiten(
    values_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    shift_mean: bool = True,
    moments: torch.Tensor | None = None,
) -> torch.Tensor:
    """Values [B, T] with mean 0 and standard deviation 1 where `mask_BT` is True, and 0 elsewhere.

    `shift_mean=False` keeps the mean (for rewards). `moments` are the sum of `moments_of` over
    processes; by default, of these values. The variance has Bessel's correction, as in
    summarize_from_feedback_details and TRL; a single value becomes 0, or stays with its mean.
    """
    # detail 12 (OpenRLHF): each process whitens with the statistics of all.
    count, total, squares = moments_of(values_BT, mask_BT) if moments is None else moments
    mean = total / count
    variance = ((squares - total * mean) / (count - 1).clamp(min=1)).clamp(min=0)
    whitened_BT = (values_BT - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened_BT = whitened_BT + mean
    # detail 12 (summarize_from_feedback_details): subtracting the mean made padding nonzero.
    return whitened_BT.masked_fill(~mask_BT, 0)


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kind: KLKind) -> torch.Tensor:
    """Estimates of KL(policy || reference) in nats, with the inputs' shape, from tokens that the
    policy sampled (Schulman, "Approximating KL Divergence").

    k1 and k3 are unbiased; k1 may be negative, k2 and k3 may not. The log-ratio is clamped.
    """
    # detail 9 (verl): k1 goes into the reward. In a loss, k2's mean gradient is the gradient of the
    # KL, k1's is zero, and k3's is the gradient of KL(reference || policy).
    log_ratio = (logprobs - ref_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    # In float32, exp() - 1 would be negative for half of all small log-ratios.
    return torch.expm1(-log_ratio) + log_ratio


def token_rewards(
    scores_B: torch.Tensor, kl_BT: torch.Tensor, response_mask_BT: torch.Tensor, kl_coef: float
) -> torch.Tensor:
    """Rewards [B, T]: -kl_coef * KL at each real token, plus the score at the last one.

    Raises ValueError for a row without a real token: its score would be lost.
    """
    empty_B = ~response_mask_BT.any(1)
    if empty_B.any():
        raise ValueError(f"rows {empty_B.nonzero().flatten().tolist()} have no real token")
    places_T = torch.arange(response_mask_BT.shape[1], device=response_mask_BT.device)
    last_B1 = torch.where(response_mask_BT, places_T, -1).amax(1, keepdim=True)
    rewards_BT = (-kl_coef * kl_BT).masked_fill(~response_mask_BT, 0)
    # detail 8 (summarize_from_feedback_details): the score is at the last action, the EOS if there
    # is one. The place after it would need a value mask of its own.
    return torch.where(places_T == last_B1, rewards_BT + scores_B[:, None], rewards_BT)


def gae(
    rewards_BT: torch.Tensor,
    values_BT: torch.Tensor,
    response_mask_BT: torch.Tensor,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages [B, T], returns [B, T]) by generalised advantage estimation (1506.02438).

    Advantages are not whitened. Both are 0 where `response_mask_BT` is False; the real tokens
    around a gap are neighbours.
    """
    # detail 11 (summarize_from_feedback_details): the value after the last action is 0.
    next_value_B = torch.zeros_like(values_BT[:, 0])
    advantage_B = torch.zeros_like(next_value_B)
    reversed_advantages = []
    for t in reversed(range(rewards_BT.shape[1])):
        real_B = response_mask_BT[:, t]
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        # detail 11 (NeMo-RL, verl): a gap keeps the advantage and the value of what follows.
        advantage_B = torch.where(real_B, delta_B + gamma * lam * advantage_B, advantage_B)
        next_value_B = torch.where(real_B, values_BT[:, t], next_value_B)
        reversed_advantages.append(advantage_B)
    advantages_BT = torch.stack(reversed_advantages[::-1], 1).masked_fill(~response_mask_BT, 0)
    # detail 12 (summarize_from_feedback_details): returns come from unwhitened advantages, so they
    # keep the units of the rewards.
    return advantages_BT, (advantages_BT + values_BT).masked_fill(~response_mask_BT, 0)


def leave_one_out(rewards_N: torch.Tensor, group_N: torch.Tensor) -> torch.Tensor:
    """Advantages [N] of sequences: the reward minus the mean reward of the prompt's other sequences
    (RLOO, 2402.14740); `group_N` is the prompt's number.

    A sequence that is alone has no baseline: its advantage is 0.
    """
    alone_NN = torch.eye(len(group_N), dtype=torch.bool, device=group_N.device)
    others_NN = (group_N[:, None] == group_N) & ~alone_NN
    others_N = others_NN.sum(1)
    baseline_N = torch.where(others_NN, rewards_N, 0).sum(1) / others_N.clamp(min=1)
    return torch.where(others_N > 0, rewards_N - baseline_N, 0)


@dataclass(frozen=True)
class PolicyLoss:
    """Scalars. `loss` has a gradient; the others are detached sums over the mask. They add up over
    the micro-batches of a minibatch; divide by its tokens for the mean.
    """

    loss: torch.Tensor
    clipped: torch.Tensor  # number of tokens whose ratio was clipped
    approxkl: torch.Tensor  # sum of 0.5 * log-ratio^2, nats, as in TRL
    ratio: torch.Tensor


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cliprange: float,
    total: float,
) -> PolicyLoss:
    """PPO's clipped objective (1707.06347, eq. 7), negated: the sum over the mask of
    max(-A r, -A clip(r, 1 - cliprange, 1 + cliprange)), divided by `total`.

    All tensors have one shape.
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0)
    log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    advantages = advantages.masked_fill(~mask, 0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    # detail 13 (summarize_from_feedback_details)
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return PolicyLoss(
        # detail 14 (OpenRLHF): `total` counts the tokens of the whole minibatch, however it is cut.
        loss=torch.maximum(unclipped, clipped).sum() / total,
        clipped=(clipped > unclipped).float().sum(),
        approxkl=0.5 * log_ratio.detach().square().sum(),
        ratio=ratio.detach().masked_fill(~mask, 0).sum(),
    )


@dataclass(frozen=True)
class ValueLoss:
    """Scalars, which add up over micro-batches; `loss` has a gradient."""

    loss: torch.Tensor
    clipped: torch.Tensor  # number of tokens whose loss the clip changed


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    cliprange_value: float | None,
    total: float,
) -> ValueLoss:
    """Half the larger of two squared errors: of the values, and of the values within
    `cliprange_value` (None: no clip) of the old ones; the sum over the mask, divided by `total`.

    All tensors have one shape.
    """
    values, old_values, returns = (x.masked_fill(~mask, 0) for x in (values, old_values, returns))
    unclipped = clipped = (values - returns).square()
    if cliprange_value is not None:
        near = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
        clipped = (near - returns).square()
    return ValueLoss(
        # detail 13 (summarize_from_feedback_details): the larger one, halved.
        loss=0.5 * torch.maximum(unclipped, clipped).sum() / total,
        clipped=(clipped > unclipped).float().sum(),
    )


@dataclass
class AdaptiveKL:
    """A KL coefficient `value` that moves the KL of a sequence, in nats, to `target` (1909.08593).

    `horizon` is in sequences; a step of more than 5 horizons could change the sign. Its state is
    `value`; target and horizon are settings.
    """

    value: float
    target: float
    horizon: float

    def update(self, kl: float, n: int) -> None:
        """Adapt the coefficient to the mean KL `kl` of `n` sequences."""
        # detail 10 (lm-human-preferences, verl)
        error = min(max(kl / self.target - 1, -KL_STEP_LIMIT), KL_STEP_LIMIT)
        self.value *= 1 + error * n / self.horizon

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


@dataclass
class RunningMoments:
    """Mean and standard deviation of all scores so far, to scale scores (2307.04964).

    `squares` is the sum of squared distances from the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """With Bessel's correction; 1 with fewer than two scores, 0 if all are equal."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 1.0

    def update(self, scores_N: torch.Tensor) -> None:
        """Add the scores [N] of all processes, N >= 0."""
        if not len(scores_N):
            return
        # detail 18 ("Secrets of RLHF"), with the sums of Chan et al. 1979, which keep no score.
        scores_N = scores_N.detach().double()
        mean, n = float(scores_N.mean()), len(scores_N)
        apart, count = mean - self.mean, self.count + n
        self.squares += float((scores_N - mean).square().sum()) + apart**2 * self.count * n / count
        self.mean += apart * n / count
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
