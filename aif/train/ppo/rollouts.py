"""Responses of the policy as it learns.

A backend is given the policy's weights before each step (`sync`) and prompts in tokens with a seed
each (`sample`). What it draws is a function of both, so that a step that is run again after a stop
draws the same responses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from aif.errors import AifError
from aif.models.decode import decode

ROWS = {"cpu": 64, "cuda": 256}  # decoded together


@dataclass(frozen=True, slots=True)
class Rollout:
    """A response in tokens: up to and with its first EOS, or `ended` is False."""

    ids_T: np.ndarray  # int32
    ended: bool


class Rollouts(Protocol):
    """A way to sample from the policy; `models` take memory on its device."""

    models: Sequence[Any]

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take over the policy's weights, by their names in the transformers model."""

    def sample(self, prompts: Sequence[np.ndarray], seeds: Sequence[int]) -> list[Rollout]:
        """A response to each prompt, in their order."""

    def close(self) -> None:
        """Free what it holds."""


class TransformersRollouts:
    """Decoding on a transformers model of its own, whose finished sequences leave the batch.

    `top_p` and `top_k` are not offered: the ratio of PPO is of the whole distribution, and one
    that is cut off is another (trl#6789).
    """

    def __init__(
        self, model: Any, *, max_tokens: int, temperature: float, ends: set[int], pad_id: int
    ):
        self.model = model.requires_grad_(False).eval()
        self.max_tokens, self.temperature, self.pad_id = max_tokens, temperature, pad_id
        self.models = [model]  # that take memory on this device
        self._ends = ends
        self._weights = dict(model.named_parameters())

    @torch.no_grad()
    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take over the policy's weights, rounded to this model's. Raises AifError where one of
        this model's is not among them."""
        missing = set(self._weights)
        for name, weight in weights:
            if name in self._weights:  # a tied head is there under one name
                self._weights[name].copy_(weight)
                missing.discard(name)
        if missing:
            raise AifError(f"ppo: the policy has no weight {min(missing)} to sample with")

    def sample(self, prompts: Sequence[np.ndarray], seeds: Sequence[int]) -> list[Rollout]:
        """A response to each prompt, in their order; prompts of like lengths run together."""
        order = sorted(range(len(prompts)), key=lambda n: (len(prompts[n]), n))
        found: list[Rollout | None] = [None] * len(prompts)
        rows = ROWS.get(self.model.device.type, ROWS["cuda"])
        for start in range(0, len(order), rows):
            some = order[start : start + rows]
            made = decode(
                self.model,
                [prompts[n].tolist() for n in some],
                seeds=[seeds[n] for n in some],
                temperatures=[self.temperature] * len(some),
                max_tokens=self.max_tokens,
                ends=self._ends,
                pad=self.pad_id,
            )
            for n, drawn in zip(some, made, strict=True):
                if drawn is None:
                    raise AifError("ppo: the policy's logits are not finite numbers")
                found[n] = Rollout(np.array(drawn.ids, np.int32), drawn.stopped)
        return found

    def close(self) -> None:
        """Nothing: the model goes when nobody holds it."""
