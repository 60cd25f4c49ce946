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
from transformers import StaticCache

from aif.errors import AifError

ROWS = {"cpu": 64, "cuda": 256}  # decoded together
DROP = 8  # finished rows leave the batch once they are one in so many


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
        self._ends = torch.tensor(sorted(ends), device=model.device)
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
            made = self._decode([prompts[n] for n in some], [seeds[n] for n in some])
            for n, rollout in zip(some, made, strict=True):
                found[n] = rollout
        return found

    def close(self) -> None:
        """Nothing: the model goes when nobody holds it."""

    @torch.inference_mode()
    def _decode(self, prompts: Sequence[np.ndarray], seeds: Sequence[int]) -> list[Rollout]:
        device = self.model.device
        # One number a token decides it, whoever else is in the batch.
        noise_BT = torch.from_numpy(
            np.stack([np.random.default_rng(seed).random(self.max_tokens) for seed in seeds])
        ).to(device)
        # A prompt that is asked several times is run once.
        once = {prompt.tobytes(): prompt for prompt in prompts}
        number = {ids: n for n, ids in enumerate(once)}
        of_B = torch.tensor([number[prompt.tobytes()] for prompt in prompts], device=device)
        ids_BT, mask_BT = (t.to(device) for t in left_padded(list(once.values()), self.pad_id))
        position_B1 = mask_BT.sum(1, keepdim=True)
        # Of its full length from the start: one that grows is copied at every token.
        length = ids_BT.shape[1] + self.max_tokens
        cache = StaticCache(config=self.model.config, max_cache_len=length)
        position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        # Not the number 1: the view that it makes has torch.matmul copy the head's frozen weight
        # once a row (pytorch#186148), 3.6 GB for 64 rows and a vocabulary of 49,152.
        last = torch.tensor([-1], device=device)
        new: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))  # of `new`, that are still in the batch
        done_B = torch.zeros(len(rows), dtype=torch.bool, device=device)
        for t in range(self.max_tokens):
            logits_BV = self.model(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=position_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=last,
            ).logits[:, -1]
            if t == 0:  # from here on every response has a row of its own
                keep_rows(cache, of_B)
                logits_BV, mask_BT, position_B1 = logits_BV[of_B], mask_BT[of_B], position_B1[of_B]
            next_B = drawn(logits_BV, self.temperature, noise_BT[:, t])
            for row, token, done in zip(rows, next_B.tolist(), done_B.tolist(), strict=True):
                if not done:
                    new[row].append(token)
            done_B = done_B | torch.isin(next_B, self._ends)
            finished = int(done_B.sum())
            if finished == len(rows):
                break
            ids_BT = next_B[:, None]
            mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], 1)
            if finished * DROP >= len(rows):
                keep = (~done_B).nonzero().squeeze(1)
                keep_rows(cache, keep)
                ids_BT, mask_BT, noise_BT = ids_BT[keep], mask_BT[keep], noise_BT[keep]
                position_B1, done_B = position_B1[keep], done_B[keep]
                rows = [rows[n] for n in keep.tolist()]
            position_BT = position_B1 + t
        ends = set(self._ends.tolist())
        return [Rollout(np.array(ids, np.int32), ids[-1] in ends) for ids in new]


def keep_rows(cache: StaticCache, rows: torch.Tensor) -> None:
    """Make these rows of the batch, which may be there several times, the whole of it."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[rows], layer.values[rows]


def left_padded(prompts: Sequence[np.ndarray], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), [B, T]: all prompts end in the last column."""
    width = max(map(len, prompts))
    ids_BT = np.full((len(prompts), width), pad_id)
    mask_BT = np.zeros((len(prompts), width), int)
    for row, ids in enumerate(prompts):
        ids_BT[row, width - len(ids) :] = ids
        mask_BT[row, width - len(ids) :] = 1
    return torch.from_numpy(ids_BT).long(), torch.from_numpy(mask_BT).long()


def drawn(logits_BV: torch.Tensor, temperature: float, noise_B: torch.Tensor) -> torch.Tensor:
    """A draw of softmax(logits / T) in each row by its number in [0, 1): where the cumulative
    probability passes it. Raises AifError where the logits are not numbers."""
    cumulative_BV = (logits_BV.float() / temperature).softmax(-1)
    # In float64: a parallel sum in float32 may fall a little from one token to the next.
    cumulative_BV = cumulative_BV.cumsum(-1, dtype=torch.float64)
    if not cumulative_BV[:, -1].isfinite().all():
        raise AifError("ppo: the policy's logits are not finite numbers")
    # Rounding leaves the sum a little off 1, and may take a number just below 1 to 1; below the
    # sum it always ends at a token, and never at one of probability 0.
    level_B1 = (noise_B.double().clamp(max=1 - 2**-50) * cumulative_BV[:, -1])[:, None]
    return torch.searchsorted(cumulative_BV, level_B1, right=True).squeeze(1)
