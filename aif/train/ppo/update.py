"""A step's epochs of minibatches: policy and critic learn from what was sampled."""

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

NAMED = 8  # prompts, in an error


class NotFinite(AifError):
    """A loss or a gradient is nan or infinite; no weight has been touched by it."""


@dataclass
class Learner:
    """The model that learns, its optimizer, and how a minibatch lies in memory.

    `ptx` are batches of other texts whose likelihood is kept up on the way (InstructGPT's PPO-ptx,
    2203.02155).
    """

    accelerator: Any
    model: Any  # an ActorCritic, as the accelerator wrapped it
    optimizer: Any
    layout: Layout
    settings: PPOSettings
    ptx: Steps | None = None
    _sums: dict[str, float] = field(default_factory=dict)

    def update(self, found: Experience, step: int) -> dict[str, float]:
        """Learn from one step's responses; returns the means of what was measured on the way.

        Raises NotFinite, before any weight is touched, where a loss or a gradient is no number.
        """
        measured: dict[str, list[float]] = defaultdict(list)
        self.model.train()
        for number, rows in enumerate(self._minibatches(len(found.rows), step)):
            self.optimizer.zero_grad()
            self._sums = defaultdict(float)
            total = self._over_processes(float(found.mask_BT[rows].sum()))
            self._ptx_gradients(step, number)
            self._gradients(found, rows, total)
            seen = {name: self._over_processes(value) for name, value in self._sums.items()}
            for name, value in seen.items():
                measured[name].append(value)
            # Schulman et al. 2017: an early stop where the policy has left its trust region.
            if self.settings.target_kl and seen["policy/approxkl_avg"] > self.settings.target_kl:
                break
            for name, norm in self._clipped_norms(answers(found, rows)).items():
                measured[name].append(norm)
            self.optimizer.step()
        means = {name: fmean(values) for name, values in measured.items()}
        means["val/ratio_var"] = float(np.var(measured["val/ratio"]))
        means["policy/updates"] = float(len(measured.get("policy/grad_norm", ())))
        return means

    def _minibatches(self, rows: int, step: int) -> Iterator[list[int]]:
        """Rows of each optimizer step: a fresh permutation an epoch (detail 14)."""
        rank = self.accelerator.process_index
        parts = min(self.settings.minibatches, min(all_gather(rows)))
        for epoch in range(self.settings.ppo_epochs):
            draw = np.random.default_rng([self.settings.seed, step, epoch, rank])
            for part in np.array_split(draw.permutation(rows), parts):
                yield part.tolist()

    def _gradients(self, found: Experience, rows: list[int], total: float) -> None:
        """Add the gradients of PPO's losses over these rows, micro-batch by micro-batch."""
        batches = list(micro_batches([found.rows[n] for n in rows], self.layout))
        for n, (places, batch) in enumerate(batches):
            numbers = [rows[place] for place in places]
            last = n + 1 == len(batches)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = self._loss(found, numbers, batch, total)
                self._check(float(loss.detach()), f"loss of {answers(found, numbers)}")
                self.accelerator.backward(loss * self.accelerator.num_processes)

    def _loss(
        self, found: Experience, numbers: list[int], batch: Batch, total: float
    ) -> torch.Tensor:
        """Policy loss, value loss and entropy bonus of a micro-batch, over the tokens of the whole
        minibatch (detail 14), so that it does not matter how that is cut."""
        settings, mask_BT = self.settings, found.mask_BT[numbers]
        logprobs_N, values_N, entropy_N = self.model(
            **batch.inputs(self.accelerator.device), entropy=settings.entropy_coef > 0
        )
        here_N = torch.ones_like(logprobs_N, dtype=torch.bool)

        def pick(known_BT: torch.Tensor) -> torch.Tensor:
            return known_BT[numbers][mask_BT]

        policy = policy_loss(
            logprobs_N, pick(found.logprobs_BT), pick(found.advantages_BT), here_N,
            settings.cliprange, total,
        )  # fmt: skip
        loss = policy.loss
        self._add("loss/policy_avg", policy.loss)
        self._add("policy/clipfrac_avg", policy.clipped / total)
        self._add("policy/approxkl_avg", policy.approxkl / total)
        self._add("val/ratio", policy.ratio / total)
        if values_N is not None:
            value = value_loss(
                values_N, pick(found.values_BT), pick(found.returns_BT), here_N,
                settings.cliprange_value, total,
            )  # fmt: skip
            loss = loss + settings.vf_coef * value.loss
            self._add("loss/value_avg", value.loss)
            self._add("val/clipfrac_avg", value.clipped / total)
        if entropy_N is not None:
            loss = loss - settings.entropy_coef * entropy_N.sum() / total
        return loss

    def _ptx_gradients(self, step: int, number: int) -> None:
        if self.ptx is None:
            return
        each = self.settings.ppo_epochs * self.settings.minibatches
        texts = self.ptx[step * each + number]
        for batch in texts.batches:
            with self.accelerator.no_sync(self.model):
                nll = self.model(**batch.inputs(self.accelerator.device), texts=True)
                loss = self.settings.ptx_coef * nll / texts.loss_items
                # Every process has the same texts, and what is added is summed over all of them.
                self._add("loss/ptx_avg", nll / texts.loss_items / self.accelerator.num_processes)
                self._check(float(loss.detach()), "loss of the ptx texts")
                self.accelerator.backward(loss)

    def _clipped_norms(self, of: str) -> dict[str, float]:
        """Clip the gradients, the policy's and the critic's each by themselves: an error of the
        critic is not to shorten the policy's step."""
        model = self.accelerator.unwrap_model(self.model)
        norms = {}
        for name, part in (("policy", model.policy), ("value", model.critic)):
            if part is None:
                continue
            weights = [w for w in part.parameters() if w.requires_grad]
            most = self.settings.max_grad_norm or math.inf
            norms[f"{name}/grad_norm"] = float(self.accelerator.clip_grad_norm_(weights, most))
            self._check(norms[f"{name}/grad_norm"], f"gradient of the {name} over {of}")
        return norms

    def _add(self, name: str, value: torch.Tensor) -> None:
        self._sums[name] += float(value.detach())

    def _over_processes(self, value: float) -> float:
        if self.accelerator.num_processes == 1:
            return value
        tensor = torch.tensor(value, device=self.accelerator.device)
        return float(self.accelerator.reduce(tensor, "sum"))

    def _check(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            raise NotFinite(f"the {what} is {value}")


def answers(found: Experience, rows: Sequence[int]) -> str:
    """What these rows are, to a person."""
    prompts = sorted({found.prompts[n][:12] for n in rows})
    more = f" and {len(prompts) - NAMED:,} more" if len(prompts) > NAMED else ""
    return f"the responses to prompts {', '.join(prompts[:NAMED])}{more}"
