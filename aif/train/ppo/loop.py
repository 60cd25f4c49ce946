"""PPO on a language model (1707.06347; Ziegler et al. 2019, 1909.08593): one step after another.

The details that are known to matter; the code of this package cites them by number ("detail 8"):

 1  no dropout in policy, reference, reward model and critic
 2  prompts are padded on the left for sampling; masks never depend on a token's id
 3  one temperature in sampling, reference and update; no top-p and no top-k
 4  a response ends at its first EOS and is scored up to there; a missing EOS costs a penalty
 5  the reward model reads the last real token
 6  the critic is a model of its own that starts as the reward model (its head at zero, or as the
    reward model's: ppo.critic_head), and may train alone for some steps (ppo.critic_warmup)
 7  the reward model's head starts small; its scores are normalised on reference responses
 8  the score is added to the reward of the last token, the KL penalty to that of every token
 9  k1 in the reward; in a loss, k2
10  an adaptive KL coefficient
11  GAE with gamma 1 and lambda 0.95, no bootstrap at the end, carried over masked gaps
12  returns from advantages before whitening; whitening over the real tokens of all processes
13  ratios clipped at 0.2; half the larger of two squared value errors, values clipped at 0.1
14  several epochs, a fresh permutation each; losses over the tokens of a whole minibatch
15  Adam with an epsilon of 1e-5, a learning rate that falls to zero, clipped gradients
16  log-ratios within 20
17  the model that learns computes the logprobs of sampled responses again
18  optional: scores divided by their running deviation, an entropy bonus, ptx
19  checkpoints of policy, critic, optimizer, coefficient and step, complete or not used

(Huang et al. 2023-24, "The N implementation details of RLHF with PPO" and 2403.17031; Zheng et al.
2023, 2307.04964; OpenRLHF; verl.)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch

from aif.config.settings import PPOSettings
from aif.errors import AifError
from aif.models.decode import SampledTokens
from aif.store.records import content_id
from aif.train.batch import Layout
from aif.train.distributed import all_gather, gather_rows, weighted_mean
from aif.train.ppo.actor_critic import Reference, merged_weights
from aif.train.ppo.experience import (
    Experience,
    compute_advantages,
    compute_logprobs,
    compute_rewards,
    response_mask,
    tokens_of,
)
from aif.train.ppo.maths import AdaptiveKL, RunningMoments
from aif.train.ppo.prompts import PolicyPrompt, PromptStream
from aif.train.ppo.rewards import WeightedRewards
from aif.train.ppo.rollouts import Rollouts
from aif.train.ppo.update import Learner


@dataclass
class TrainState:
    """What a checkpoint keeps besides weights, optimizer and learning rate."""

    kl_controller: AdaptiveKL
    score_moments: RunningMoments = field(default_factory=RunningMoments)
    step: int = 0  # finished steps
    log: list[dict[str, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        parts = {"kl": self.kl_controller.state_dict(), "scores": self.score_moments.state_dict()}
        return parts | {"step": self.step, "log": self.log}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kl_controller.load_state_dict(state["kl"])
        self.score_moments.load_state_dict(state["scores"])
        self.step, self.log = state["step"], state["log"]


@dataclass
class PPO:
    """All that a step needs; `prompts[k]` are the prompts of step k."""

    settings: PPOSettings
    accelerator: Any
    learner: Learner
    reference: Reference
    rollouts: Rollouts
    score: WeightedRewards
    prompts: PromptStream
    layout: Layout
    tokenizer: Any
    scheduler: Any
    state: TrainState
    seconds: dict[str, float] = field(default_factory=dict)  # of the last step, by phase

    def step(self) -> dict[str, float]:
        """One step of PPO, in the order of openai/lm-human-preferences; returns its metrics."""
        settings, device = self.settings, self.accelerator.device
        k, kl_coef = self.state.step, self.state.kl_controller.value
        prompts = self.prompts_of_step(k)

        # 1. responses: the policy samples `ppo.samples` responses to each prompt.
        with self._timed("rollout"):
            responses = self.sample(prompts, self.seeds_of_step(k, len(prompts)))

        # 2. scores: what the rewards of `ppo.reward` say; a response without a score is dropped.
        with self._timed("score"):
            texts = texts_of(responses, self.tokenizer)
            scores = self.score([prompt.messages for prompt in prompts], texts)
        scored = [n for n, score in enumerate(scores) if score is not None]
        if not min(all_gather(len(scored))):
            raise AifError("none of its responses has a score")

        with self._timed("read"):
            prompt_ids = [prompts[n].id for n in scored]
            rows = [tokens_of(prompts[n].ids_T, responses[n]) for n in scored]
            mask_BT = response_mask(rows).to(device)

            # 3. logprobs, ref_logprobs and values of the response tokens (detail 17).
            model = self.learner.model
            outputs = compute_logprobs(rows, model, self.reference, self.layout, device)

            # 4. rewards: a KL penalty at every token, the score at the last one (detail 8).
            ended = [responses[n].ended for n in scored]
            scores_B = self.adjust_scores([scores[n] for n in scored], ended).to(device)
            rewards_BT = compute_rewards(scores_B, outputs, mask_BT, kl_coef, settings)

            # 5. advantages and returns: GAE, or the whole response for RLOO and REINFORCE.
            advantages_BT, returns_BT = compute_advantages(
                rewards_BT, outputs.values_BT, mask_BT, prompt_ids, settings
            )

        # 6. update: epochs of minibatches for policy and critic (details 13 and 14).
        experience = Experience(
            **vars(outputs), rows=rows, prompt_ids=prompt_ids, response_mask_BT=mask_BT,
            rewards_BT=rewards_BT, advantages_BT=advantages_BT, returns_BT=returns_BT,
        )  # fmt: skip
        with self._timed("learn"):
            update_metrics = self.update(experience, k)
        metrics = self._metrics(experience, responses, scores, update_metrics)

        # 7. kl_coef: of all processes' KL, so that it stays the same in each (detail 10).
        if settings.kl_target:
            self.state.kl_controller.update(metrics["objective/kl"], sum(all_gather(len(rows))))
        self.state.step += 1
        self.state.log.append({"step": self.state.step, **metrics})
        return metrics

    def prompts_of_step(self, k: int) -> list[PolicyPrompt]:
        """This process's prompts, each `ppo.samples` times."""
        share = self.prompts[k][self.accelerator.process_index :: self.accelerator.num_processes]
        return [prompt for prompt in share for _ in range(self.settings.samples)]

    def seeds_of_step(self, k: int, count: int) -> list[int]:
        """A seed for each response: it depends on its place in the step, and not on the number of
        processes."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        samples = self.settings.samples
        return [
            seed_of(self.settings.seed, k, rank + n // samples * world, n % samples)
            for n in range(count)
        ]

    def sample(self, prompts: Sequence[PolicyPrompt], seeds: Sequence[int]) -> list[SampledTokens]:
        """A response of the current policy to each prompt."""
        policy = self.accelerator.unwrap_model(self.learner.model).policy
        self.rollouts.sync(merged_weights(policy))
        return self.rollouts.sample([prompt.ids_T for prompt in prompts], seeds)

    def adjust_scores(self, scores: Sequence[float], ended: Sequence[bool]) -> torch.Tensor:
        """Scores [B]: scaled (detail 18), clipped, and less the penalty without EOS (detail 4)."""
        settings, moments = self.settings, self.state.score_moments
        scores_B = torch.tensor(scores, dtype=torch.float32)
        if settings.scale_scores:
            moments.update(torch.tensor(gather_rows(list(scores)), dtype=torch.float32))
            scores_B = scores_B / (moments.std or 1.0)
        if settings.score_clip:
            scores_B = scores_B.clamp(-settings.score_clip, settings.score_clip)
        return scores_B - settings.missing_eos_penalty * (~torch.tensor(ended)).float()

    def update(self, experience: Experience, k: int) -> dict[str, float]:
        """Learn from one step; returns the metrics of the update and the policy's learning rate."""
        policy_group = self.learner.optimizer.param_groups[0]
        lr = policy_group["lr"]
        if k < self.settings.critic_warmup:  # detail 6: the critic trains alone
            policy_group["lr"] = 0.0
        metrics = self.learner.update(experience, k)
        policy_group["lr"] = lr
        self.scheduler.step()
        return metrics | {"lr": lr}

    def _metrics(
        self,
        experience: Experience,
        responses: Sequence[SampledTokens],
        scores: Sequence[float | None],
        update_metrics: dict[str, float],
    ) -> dict[str, float]:
        """Metrics of the step under TRL's names, over all processes. The mean of each reward
        source and the explained variance are means over processes."""
        kl, kl_coef = float(experience.kl_B.mean()), self.state.kl_controller.value
        tokens = sum(len(response.ids) for response in responses)
        scored = [score for score in scores if score is not None]
        of_scored = {
            "objective/kl": kl,
            "objective/entropy": float(experience.entropy_BT.sum(1).mean()),
            "objective/non_score_reward": -kl_coef * kl,
            "objective/rlhf_reward": float(experience.rewards_BT.sum(1).mean()),
            "objective/scores": fmean(scored),
            "objective/kl_coef": kl_coef,
            "policy/entropy_avg": float(
                experience.entropy_BT.sum() / experience.response_mask_BT.sum()
            ),
        }
        of_scored |= {f"objective/scores/{name}": mean for name, mean in self.score.means.items()}
        if experience.values_BT is not None:
            of_scored["val/explained_variance"] = explained_variance(experience)
        of_all = {
            "val/eos_rate": fmean(response.ended for response in responses),
            "val/response_length": tokens / len(responses),
        }
        metrics = weighted_mean(of_scored, len(scored)) | weighted_mean(of_all, len(scores))
        metrics["val/unscored"] = sum(all_gather(len(scores) - len(scored)))
        metrics |= {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}
        metrics["time/rollout_tokens_per_s"] = tokens / self.seconds["rollout"]
        read_tokens = sum(map(len, experience.rows))
        metrics["time/read_tokens_per_s"] = read_tokens / self.seconds["read"]
        passes = update_metrics["policy/updates"] / self.settings.minibatches
        metrics["time/learn_tokens_per_s"] = read_tokens * passes / self.seconds["learn"]
        samples = self.settings.batch_size * self.settings.samples
        return metrics | {"episode": (self.state.step + 1) * samples} | update_metrics

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[phase] = time.perf_counter() - began


def seed_of(*parts: object) -> int:
    """A seed that depends on these values only."""
    return int(content_id("rollout", *parts)[:15], 16)


def texts_of(responses: Sequence[SampledTokens], tokenizer: Any) -> list[str]:
    """The responses as text, without the token that ends them."""
    ids = [list(response.ids[: len(response.ids) - response.ended]) for response in responses]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def explained_variance(experience: Experience) -> float:
    """The share of the returns' variance that the critic's values explain."""
    mask_BT = experience.response_mask_BT
    returns_N, values_N = experience.returns_BT[mask_BT], experience.values_BT[mask_BT]
    return float(1 - (returns_N - values_N).var() / returns_N.var().clamp(min=1e-8))
