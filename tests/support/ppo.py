"""Small policies and steps for the tests of PPO."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from transformers import LlamaForSequenceClassification

from aif.config.settings import PPOSettings
from aif.models.decode import SampledTokens
from aif.train.ppo.actor_critic import ActorCritic, TokenOutputs
from aif.train.ppo.experience import (
    Experience,
    ModelOutputs,
    compute_advantages,
    compute_rewards,
    response_mask,
    tokens_of,
)
from aif.train.tokens import TokenRow
from tests.support.tiny import tiny_model

T = 0.7


def one_thread() -> Iterator[None]:
    """One process and one thread, as bits depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


def tiny_actor(critic: bool = True, lora: bool = False) -> ActorCritic:
    """A policy whose attention and distributions are far from even, with dropout."""
    policy = tiny_model(vocab_size=64, initializer_range=0.3)
    scorer = None
    if critic:
        config = copy.deepcopy(policy.config)
        config.num_labels = 1
        scorer = LlamaForSequenceClassification(config)
    if lora:
        import peft

        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        policy = peft.get_peft_model(policy, config)
    return ActorCritic(policy, scorer, T, shift=0.3, scale=2.0)


def outputs_alone(actor: ActorCritic, row: TokenRow) -> TokenOutputs:
    """The outputs of one row's response, by the models' own forwards on that row alone."""
    ids_1T = torch.tensor(row.ids_T[None].astype(int))
    at_N = torch.tensor(row.loss_mask_T.nonzero()[0])
    logits_TV = actor.policy(input_ids=ids_1T).logits[0]
    logprobs_NV = (logits_TV[at_N - 1] / actor.temperature).log_softmax(-1)
    values_N = None
    if actor.critic is not None:
        scores = [actor.critic(input_ids=ids_1T[:, :t]).logits[0, 0] for t in at_N]
        values_N = actor.scale * (torch.stack(scores) - actor.shift)
    return TokenOutputs(
        logprobs_NV[range(len(at_N)), ids_1T[0, at_N]],
        values_N,
        -(logprobs_NV.exp() * logprobs_NV).sum(-1),
    )


def response_row(prompt_T: Any, response: Any) -> TokenRow:
    """A prompt with a response that ended, both in tokens."""
    ids = tuple(np.asarray(response).tolist())
    return tokens_of(np.asarray(prompt_T, np.int32), SampledTokens(ids, True))


def experience_of(
    rows: list[TokenRow],
    prompt_ids: list[str],
    scores_B: torch.Tensor,
    outputs: ModelOutputs,
    settings: PPOSettings,
    kl_coef: float = 0.1,
) -> Experience:
    """The experience of a step, as `PPO.step` makes it."""
    mask_BT = response_mask(rows)
    rewards_BT = compute_rewards(scores_B, outputs, mask_BT, kl_coef, settings)
    advantages_BT, returns_BT = compute_advantages(
        rewards_BT, outputs.values_BT, mask_BT, prompt_ids, settings
    )
    return Experience(
        **vars(outputs), rows=rows, prompt_ids=prompt_ids, response_mask_BT=mask_BT,
        rewards_BT=rewards_BT, advantages_BT=advantages_BT, returns_BT=returns_BT,
    )  # fmt: skip
