"""The update of a step: policy and critic learn from the experience in epochs of minibatches."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import torch

from aif.config.settings import PPOSettings
from aif.errors import AifError
from aif.train.batch import Batch, Layout, Steps
from aif.train.distributed import all_gather
from aif.train.ppo.experience import Experience, micro_batches
from aif.train.ppo.maths import policy_loss, value_loss

NAMED = 8  # prompts in an error message


class NotFinite(AifError):
    """A loss or a gradient is nan or infinite; no weight has changed."""


@dataclass
class Learner:
    """The model that learns, its optimizer, and the layout of a minibatch in memory.

    `ptx` are batches of other texts that must stay likely (InstructGPT's PPO-ptx, 2203.02155).
    """

    accelerator: Any
    model: Any  # an ActorCritic, wrapped by the accelerator
    optimizer: Any
    layout: Layout
    settings: PPOSettings
    ptx: Steps | None = None
    _sums: dict[str, float] = field(default_factory=dict)  # of a minibatch, by metric

    def update(self, experience: Experience, step: int) -> dict[str, float]:
        """`ppo_epochs` epochs of `minibatches` optimizer steps; returns the means of the metrics.

        Raises NotFinite, before a weight changes, if a loss or a gradient is not finite.
        """
        history: dict[str, list[float]] = defaultdict(list)
        self.model.train()
        for number, rows in enumerate(self._minibatches(len(experience.rows), step)):
            self.optimizer.zero_grad()
            self._sums = defaultdict(float)
            tokens = self._sum_over_processes(float(experience.response_mask_BT[rows].sum()))
            self._ptx_gradients(step, number)
            self._gradients(experience, rows, tokens)
            for name, value in self._sums.items():
                history[name].append(self._sum_over_processes(value))
            # Schulman et al. 2017: stop when the policy leaves its trust region.
            target_kl = self.settings.target_kl
            if target_kl and history["policy/approxkl_avg"][-1] > target_kl:
                break
            for name, norm in self._clip_gradients(describe(experience, rows)).items():
                history[name].append(norm)
            self.optimizer.step()
        means = {name: fmean(values) for name, values in history.items()}
        means["val/ratio_var"] = float(np.var(history["val/ratio"]))
        means["policy/updates"] = float(len(history.get("policy/grad_norm", ())))
        return means

    def _minibatches(self, rows: int, step: int) -> Iterator[list[int]]:
        """The rows of each optimizer step: a fresh permutation an epoch (detail 14)."""
        rank = self.accelerator.process_index
        parts = min(self.settings.minibatches, min(all_gather(rows)))
        for epoch in range(self.settings.ppo_epochs):
            draw = np.random.default_rng([self.settings.seed, step, epoch, rank])
            for part in np.array_split(draw.permutation(rows), parts):
                yield part.tolist()

    def _gradients(self, experience: Experience, rows: list[int], tokens: float) -> None:
        """Add the gradients of PPO's losses over these rows, micro-batch by micro-batch."""
        batches = list(micro_batches([experience.rows[n] for n in rows], self.layout))
        for n, (places, batch) in enumerate(batches):
            numbers = [rows[place] for place in places]
            last = n + 1 == len(batches)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self._loss(experience, numbers, batch, tokens)
                self._check(float(loss.detach()), f"loss of {describe(experience, numbers)}")
                self.accelerator.backward(loss * self.accelerator.num_processes)

    def _loss(
        self, experience: Experience, rows: list[int], batch: Batch, tokens: float
    ) -> torch.Tensor:
        """Policy loss, value loss and entropy bonus of a micro-batch: sums over its N tokens,
        divided by the `tokens` of the whole minibatch, so the split does not matter (detail 14)."""
        settings, mask_BT = self.settings, experience.response_mask_BT[rows]
        logprobs_N, values_N, entropy_N = self.model(
            **batch.inputs(self.accelerator.device), entropy=settings.entropy_coef > 0
        )
        all_N = torch.ones_like(logprobs_N, dtype=torch.bool)
        policy = policy_loss(
            logprobs_N, experience.logprobs_BT[rows][mask_BT],
            experience.advantages_BT[rows][mask_BT], all_N, settings.cliprange, tokens,
        )  # fmt: skip
        loss = policy.loss
        self._add("loss/policy_avg", policy.loss)
        self._add("policy/clipfrac_avg", policy.clipped / tokens)
        self._add("policy/approxkl_avg", policy.approxkl / tokens)
        self._add("val/ratio", policy.ratio / tokens)
        if values_N is not None:
            value = value_loss(
                values_N, experience.values_BT[rows][mask_BT],
                experience.returns_BT[rows][mask_BT], all_N, settings.cliprange_value, tokens,
            )  # fmt: skip
            loss = loss + settings.vf_coef * value.loss
            self._add("loss/value_avg", value.loss)
            self._add("val/clipfrac_avg", value.clipped / tokens)
        if entropy_N is not None:
            loss = loss - settings.entropy_coef * entropy_N.sum() / tokens
        return loss

    def _ptx_gradients(self, step: int, number: int) -> None:
        if self.ptx is None:
            return
        texts = self.ptx[step * self.settings.ppo_epochs * self.settings.minibatches + number]
        for batch in texts.batches:
            with self.accelerator.no_sync(self.model):
                nll = self.model(**batch.inputs(self.accelerator.device), texts=True)
                loss = self.settings.ptx_coef * nll / texts.loss_items
                # Every process has the same texts, and `_sums` are summed over processes.
                self._add("loss/ptx_avg", nll / texts.loss_items / self.accelerator.num_processes)
                self._check(float(loss.detach()), "loss of the ptx texts")
                self.accelerator.backward(loss)

    def _clip_gradients(self, source: str) -> dict[str, float]:
        """Clip the policy's gradients and the critic's separately, so that an error of the critic
        does not shorten the policy's step; returns their norms."""
        model = self.accelerator.unwrap_model(self.model)
        norms = {}
        for name, part in (("policy", model.policy), ("value", model.critic)):
            if part is None:
                continue
            weights = [w for w in part.parameters() if w.requires_grad]
            limit = self.settings.max_grad_norm or math.inf
            norms[f"{name}/grad_norm"] = float(self.accelerator.clip_grad_norm_(weights, limit))
            self._check(norms[f"{name}/grad_norm"], f"gradient of the {name} over {source}")
        return norms

    def _add(self, metric: str, value: torch.Tensor) -> None:
        self._sums[metric] += float(value.detach())

    def _sum_over_processes(self, value: float) -> float:
        if self.accelerator.num_processes == 1:
            return value
        tensor = torch.tensor(value, device=self.accelerator.device)
        return float(self.accelerator.reduce(tensor, "sum"))

    def _check(self, value: float, name: str) -> None:
        if not math.isfinite(value):
            raise NotFinite(f"the {name} is {value}")


def describe(experience: Experience, rows: Sequence[int]) -> str:
    """These rows by the ids of their prompts, for an error message."""
    prompts = sorted({experience.prompt_ids[n][:12] for n in rows})
    more = f" and {len(prompts) - NAMED:,} more" if len(prompts) > NAMED else ""
    return f"the responses to prompts {', '.join(prompts[:NAMED])}{more}"
