"""Sampling responses from the policy while it trains.

A backend takes the policy's weights before each step (`sync`) and samples a response to each prompt
with a seed (`sample`). The weights and the seed decide the response, so a step that runs again
after a stop samples the same responses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from aif.errors import AifError
from aif.models.decode import SampledTokens, decode

ROWS = {"cpu": 64, "cuda": 256}  # decoded together


class Rollouts(Protocol):
    """A way to sample from the policy; `models` use memory on its device."""

    models: Sequence[Any]

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take the policy's weights, named as in the transformers model."""

    def sample(self, prompts: Sequence[np.ndarray], seeds: Sequence[int]) -> list[SampledTokens]:
        """A response to each prompt, in their order."""

    def close(self) -> None:
        """Free memory and processes."""


class TransformersRollouts:
    """Decoding on a transformers model of its own; sequences that have ended leave the batch.

    There is no `top_p` and no `top_k`: PPO's ratio is a ratio of whole distributions (trl#6789).
    """

    def __init__(
        self, model: Any, *, max_tokens: int, temperature: float, ends: set[int], pad_id: int
    ):
        self.model = model.requires_grad_(False).eval()
        self.models = [model]
        self.max_tokens, self.temperature, self.pad_id = max_tokens, temperature, pad_id
        self._ends = ends
        self._weights = dict(model.named_parameters())

    @torch.no_grad()
    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take the policy's weights, rounded to this model's dtype. Raises AifError if one of this
        model's weights is missing."""
        missing = set(self._weights)
        for name, weight in weights:
            if name in self._weights:  # a tied head is there under one name
                self._weights[name].copy_(weight)
                missing.discard(name)
        if missing:
            raise AifError(f"ppo: the policy has no weight {min(missing)} to sample with")

    def sample(self, prompts: Sequence[np.ndarray], seeds: Sequence[int]) -> list[SampledTokens]:
        """A response to each prompt, in their order; prompts of similar lengths run together."""
        order = sorted(range(len(prompts)), key=lambda n: (len(prompts[n]), n))
        responses: list[SampledTokens | None] = [None] * len(prompts)
        rows = ROWS.get(self.model.device.type, ROWS["cuda"])
        for start in range(0, len(order), rows):
            numbers = order[start : start + rows]
            batch = decode(
                self.model,
                [prompts[n].tolist() for n in numbers],
                seeds=[seeds[n] for n in numbers],
                temperatures=[self.temperature] * len(numbers),
                max_tokens=self.max_tokens,
                ends=self._ends,
                pad=self.pad_id,
            )
            if None in batch:
                raise AifError("ppo: the policy's logits are not finite numbers")
            for n, response in zip(numbers, batch, strict=True):
                responses[n] = response
        return responses

    def close(self) -> None:
        """Nothing to do: the model is freed with its last reference."""
