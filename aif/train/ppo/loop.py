"""PPO on a language model: sample, score, read, learn, step after step.

What is numbered in the code of this stage ("detail 8") is this list, of what is known to matter:

 1  no dropout in policy, reference, reward model and critic
 2  prompts padded on the left to sample, masks that never go by a token's id
 3  one temperature in sampling, reference and update; no top-p and no top-k
 4  a response ends with its first EOS and is scored then; one without an end pays for it
 5  the reward model reads the last real token
 6  a critic of its own whose body begins as the reward model (its head at zero, or as the reward
    model's too: ppo.critic_head), and may be given a head start
 7  the reward model's head starts small, its scores are normalised on reference responses
 8  the score is the reward of the last action, the KL penalty that of each
 9  k1 in the reward; in a loss, k2
10  a KL coefficient that adapts
11  GAE with gamma 1 and lambda 0.95, no bootstrap at the end, carried over masked gaps
12  returns from advantages before they are whitened; whitening over real tokens of all processes
13  ratios clipped at 0.2; half the larger of two squared value errors, at 0.1
14  several epochs, a fresh permutation each; losses over the tokens of a whole minibatch
15  Adam with an epsilon of 1e-5, a learning rate that falls to zero, clipped gradients
16  log-ratios within 20
17  log-probabilities of samples read again by the model that learns
18  optional: scores by their running deviation, an entropy bonus, ptx
19  checkpoints of both nets, optimizer, coefficient and position, complete or not used

(Huang et al. 2023-24, "The N implementation details of RLHF with PPO" and 2403.17031; Zheng et al.
2023, 2307.04964; OpenRLHF; verl.)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
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
from aif.train.ppo.experience import Experience, experience, read, tokens_of
from aif.train.ppo.maths import AdaptiveKL, RunningMoments
from aif.train.ppo.prompts import PolicyPrompt, PromptStream
from aif.train.ppo.rewards import Rewards
from aif.train.ppo.rollouts import Rollouts
from aif.train.ppo.update import Learner


@dataclass
class Position:
    """What a checkpoint keeps besides weights, optimizer and learning rate."""

    kl: AdaptiveKL
    scores: RunningMoments = field(default_factory=RunningMoments)
    step: int = 0  # steps done
    log: list[dict[str, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        parts = {"kl": self.kl.state_dict(), "scores": self.scores.state_dict()}
        return parts | {"step": self.step, "log": self.log}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kl.load_state_dict(state["kl"])
        self.scores.load_state_dict(state["scores"])
        self.step, self.log = state["step"], state["log"]


@dataclass
class PPO:
    """Everything a step needs. `prompts[k]` is what step k asks."""

    settings: PPOSettings
    accelerator: Any
    learner: Learner
    reference: Reference
    rollouts: Rollouts
    rewards: Rewards
    prompts: PromptStream
    layout: Layout
    tokenizer: Any
    scheduler: Any
    position: Position
    seconds: dict[str, float] = field(default_factory=dict)

    def step(self) -> dict[str, float]:
        """One step of the algorithm; returns what was measured, by name."""
        k, self.seconds = self.position.step, {}
        asked = self._asked(k)
        rollouts = self._timed("rollout", lambda: self._sampled(asked, k))
        scores = self._timed("score", lambda: self._scores(asked, rollouts))
        found = self._timed("read", lambda: self._experience(asked, rollouts, scores))
        learned = self._timed("learn", lambda: self._learned(found, k))
        measured = self._measured(found, rollouts, scores) | learned
        passes = learned["policy/updates"] / self.settings.minibatches
        read_tokens = sum(map(len, found.rows))
        measured["time/learn_tokens_per_s"] = read_tokens * passes / self.seconds["learn"]
        if self.settings.kl_target:
            # Of all processes: each has its own kl_coef, and they are to stay alike.
            self.position.kl.update(measured["objective/kl"], sum(all_gather(len(found.rows))))
        self.position.step += 1
        self.position.log.append({"step": self.position.step, **measured})
        return measured

    def _asked(self, k: int) -> list[PolicyPrompt]:
        """This process's share of the step's prompts, each as often as it is to be answered."""
        share = self.prompts[k][self.accelerator.process_index :: self.accelerator.num_processes]
        return [prompt for prompt in share for _ in range(self.settings.samples)]

    def sample(self, asked: Sequence[PolicyPrompt], seeds: Sequence[int]) -> list[SampledTokens]:
        """A response of the policy, as it now is, to each prompt."""
        policy = self.accelerator.unwrap_model(self.learner.model).policy
        self.rollouts.sync(merged_weights(policy))
        return self.rollouts.sample([prompt.ids_T for prompt in asked], seeds)

    def _sampled(self, asked: Sequence[PolicyPrompt], k: int) -> list[SampledTokens]:
        # A response's seed is of its place in the step, however many processes there are.
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        each = self.settings.samples
        seeds = [
            seed_of(self.settings.seed, k, rank + n // each * world, n % each)
            for n in range(len(asked))
        ]
        return self.sample(asked, seeds)

    def _scores(
        self, asked: Sequence[PolicyPrompt], rollouts: Sequence[SampledTokens]
    ) -> list[float | None]:
        texts = texts_of(rollouts, self.tokenizer)
        return self.rewards([prompt.messages for prompt in asked], texts)

    def _experience(
        self,
        asked: Sequence[PolicyPrompt],
        rollouts: Sequence[SampledTokens],
        scores: list[float | None],
    ) -> Experience:
        """Of the responses that have a score."""
        kept = [n for n, score in enumerate(scores) if score is not None]
        if not min(all_gather(len(kept))):
            raise AifError("none of its responses has a score")
        rows = [tokens_of(asked[n].ids_T, rollouts[n]) for n in kept]
        device, model = self.accelerator.device, self.learner.model
        told = read(rows, model, self.reference, self.layout, device)
        values_B = self._adjusted([scores[n] for n in kept], [rollouts[n].ended for n in kept])
        return experience(
            rows, [asked[n].id for n in kept], values_B.to(device), told, self.settings,
            self.position.kl.value, lambda moments: self.accelerator.reduce(moments, "sum"),
        )  # fmt: skip

    def _adjusted(self, scores: Sequence[float], ended: Sequence[bool]) -> torch.Tensor:
        """Scores [B] scaled, clipped, and less the penalty where no EOS came (detail 4)."""
        settings = self.settings
        scores_B = torch.tensor(scores, dtype=torch.float32)
        if settings.scale_scores:  # detail 18
            every_B = torch.tensor(gather_rows(list(scores)), dtype=torch.float32)
            self.position.scores.update(every_B)
            scores_B = scores_B / (self.position.scores.std or 1.0)
        if settings.score_clip:
            scores_B = scores_B.clamp(-settings.score_clip, settings.score_clip)
        return scores_B - settings.missing_eos_penalty * (~torch.tensor(ended)).float()

    def _learned(self, found: Experience, k: int) -> dict[str, float]:
        optimizer = self.learner.optimizer
        rates = [group["lr"] for group in optimizer.param_groups]
        if k < self.settings.critic_warmup:  # detail 6: the critic's head start
            optimizer.param_groups[0]["lr"] = 0.0
        told = self.learner.update(found, k)
        optimizer.param_groups[0]["lr"] = rates[0]
        self.scheduler.step()
        return told | {"lr": rates[0]}

    def _measured(
        self, found: Experience, rollouts: Sequence[SampledTokens], scores: Sequence[float | None]
    ) -> dict[str, float]:
        """Figures of the responses under TRL's names, over all processes; a source's mean and the
        explained variance are means of what each of them has."""
        known = [score for score in scores if score is not None]
        tokens = sum(len(rollout.ids) for rollout in rollouts)
        kl_coef = self.position.kl.value
        of_scored = {
            "objective/kl": float(found.kl_B.mean()),
            "objective/entropy": float(found.entropy_BT.sum(1).mean()),
            "objective/non_score_reward": -kl_coef * float(found.kl_B.mean()),
            "objective/rlhf_reward": float(found.rewards_BT.sum(1).mean()),
            "objective/scores": fmean(known),
            "objective/kl_coef": kl_coef,
            "policy/entropy_avg": float(found.entropy_BT.sum() / found.mask_BT.sum()),
        }
        of_scored |= {f"objective/scores/{name}": mean for name, mean in self.rewards.means.items()}
        if found.values_BT is not None:
            of_scored["val/explained_variance"] = explained(found)
        of_all = {
            "val/eos_rate": fmean(rollout.ended for rollout in rollouts),
            "val/response_length": tokens / len(rollouts),
        }
        told = weighted_mean(of_scored, len(known)) | weighted_mean(of_all, len(scores))
        told["val/unscored"] = sum(all_gather(len(scores) - len(known)))
        read_tokens = sum(map(len, found.rows))
        took = self.seconds
        told |= {f"time/{name}_s": seconds for name, seconds in took.items()}
        told["time/rollout_tokens_per_s"] = tokens / took["rollout"]
        told["time/read_tokens_per_s"] = read_tokens / took["read"]
        each = self.settings.batch_size * self.settings.samples
        return told | {"episode": (self.position.step + 1) * each}

    def _timed(self, name: str, work: Any) -> Any:
        began = time.perf_counter()
        found = work()
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = time.perf_counter() - began
        return found


def seed_of(*parts: object) -> int:
    """A seed that is a function of these alone."""
    return int(content_id("rollout", *parts)[:15], 16)


def texts_of(rollouts: Sequence[SampledTokens], tokenizer: Any) -> list[str]:
    """The responses as text, without what ends them."""
    ids = [rollout.ids[: len(rollout.ids) - rollout.ended] for rollout in rollouts]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def explained(found: Experience) -> float:
    """The share of the returns' variance that the critic knew of beforehand."""
    returns_N, values_N = found.returns_BT[found.mask_BT], found.values_BT[found.mask_BT]
    return float(1 - (returns_N - values_N).var() / returns_N.var().clamp(min=1e-8))
