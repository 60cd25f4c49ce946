"""Sampling from a causal language model: the one loop for policies and judges.

Each row has its own noise: argmax(p / E), with E exponentially distributed, is a sample of p, and
stays the same sample when rounding changes p a little. A repeated prompt runs once, and rows that
have ended leave the batch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import StaticCache

DROP = 8  # ended rows leave the batch once they are an eighth of it
NOT_A_NUMBER = -1  # the token for logits that are not finite numbers
GROUP = 256  # tokens that share one number of a row's noise: see `sample_tokens`

StopWhen = Callable[[int, Sequence[int]], bool]  # (index of the prompt, its new tokens) -> stop?


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """The new tokens of one text. `ended` is True if the last token is an EOS or completes a stop
    string, and False if `max_tokens` cut the text off."""

    ids: tuple[int, ...]
    ended: bool


@dataclass
class _Rows:
    """The batch: a row for each unfinished text, and rows that only fill it up."""

    model: Any
    cache: StaticCache
    ids_BT: torch.Tensor  # tokens that the model has not read yet
    mask_BT: torch.Tensor
    position_BT: torch.Tensor  # of `ids_BT`
    noise: list[np.random.Generator]
    temperature_B1: torch.Tensor
    of: list[int | None]  # the prompt's index; None: the text has ended, or the row is filler

    def logits(self) -> torch.Tensor:
        """Logits [B, vocabulary] of the token after the last one of each row."""
        # Not the number 1: that is a view, for which torch.matmul copies the head's frozen weight
        # once a row (pytorch#186148): 3.6 GB for 64 rows and a vocabulary of 49,152.
        last = torch.tensor([-1], device=self.ids_BT.device)
        return self.model(
            input_ids=self.ids_BT,
            attention_mask=self.mask_BT,
            position_ids=self.position_BT,
            use_cache=True,
            logits_to_keep=last,
            **{cache_name(type(self.model)): self.cache},
        ).logits[:, -1]

    def take(self, rows_B: torch.Tensor) -> None:
        """Keep these rows of the cache; a row may occur several times."""
        self.cache.reorder_cache(rows_B)
        self.mask_BT, self.position_BT = self.mask_BT[rows_B], self.position_BT[rows_B]

    def append(self, next_B: torch.Tensor) -> None:
        """Add the sampled tokens to the rows."""
        self.ids_BT = next_B.clamp(min=0)[:, None]
        self.mask_BT = torch.cat([self.mask_BT, torch.ones_like(self.ids_BT)], 1)
        self.position_BT = self.position_BT[:, -1:] + 1

    def drop(self, step: int) -> None:
        """Drop ended rows if that is worth a copy; keep a multiple of `step` rows."""
        live = [row for row, index in enumerate(self.of) if index is not None]
        ended = [row for row, index in enumerate(self.of) if index is None]
        kept = live + ended[: -len(live) % step]
        if (len(self.of) - len(kept)) * DROP < len(self.of):
            return
        rows_B = torch.tensor(kept, device=self.ids_BT.device)
        self.take(rows_B)
        self.ids_BT, self.temperature_B1 = self.ids_BT[rows_B], self.temperature_B1[rows_B]
        self.noise = [self.noise[row] for row in kept]
        self.of = [self.of[row] for row in kept]


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    temperatures: Sequence[float],
    max_tokens: int,
    ends: set[int],
    pad: int,
    width: int | None = None,
    step: int = 1,
    stop_when: StopWhen | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[SampledTokens | None]:
    """The text that the model samples after each prompt, of one token or more; None if its logits
    are not finite.

    A text ends at a token of `ends` (EOS) or where `stop_when` says so. It depends on its seed and
    its prompt; the shape of the batch changes only the rounding. Prompts are padded on the left to
    `width` (None: to the longest), and the batch always has a multiple of `step` rows.
    Temperature 0 takes the most likely token. `on_token` gets the number of tokens so far.
    """
    new: list[list[int]] = [[] for _ in prompts]
    ended, broken = set(), set()
    rows, first_BV = _prefill(model, prompts, seeds, temperatures, max_tokens, pad, width, step)
    for t in range(max_tokens):
        logits_BV = rows.logits() if t else first_BV
        next_B = sample_tokens(logits_BV, rows.temperature_B1, rows.noise)
        if on_token is not None:
            on_token(t + 1)
        for row, (index, token) in enumerate(zip(rows.of, next_B.tolist(), strict=True)):
            if index is None:
                continue
            new[index].append(token)
            if token == NOT_A_NUMBER:
                broken.add(index)
            elif token in ends or (stop_when is not None and stop_when(index, new[index])):
                ended.add(index)
            else:
                continue
            rows.of[row] = None
        if all(index is None for index in rows.of):
            break
        rows.append(next_B)
        rows.drop(step)
    return [
        None if index in broken else SampledTokens(tuple(ids), index in ended)
        for index, ids in enumerate(new)
    ]


def _prefill(
    model: Any, prompts: Sequence[Sequence[int]], seeds: Sequence[int],
    temperatures: Sequence[float], max_tokens: int, pad: int, width: int | None, step: int,
) -> tuple[_Rows, torch.Tensor]:  # fmt: skip
    """Run each distinct prompt once; returns the rows and their first logits [B, V]."""
    fill = -len(prompts) % step
    of = [*range(len(prompts)), *[0] * fill]
    once = {tuple(prompt): None for prompt in prompts}
    number = {ids: n for n, ids in enumerate(once)}
    distinct = [*once, *[next(iter(once))] * (-len(once) % step)]
    width = width or max(map(len, distinct))
    ids_BT, mask_BT = (t.to(model.device) for t in left_padded(distinct, width, pad))
    rows = _Rows(
        model,
        # Full length from the start: a cache that grows is copied at every token.
        StaticCache(config=model.config, max_cache_len=width + max_tokens),
        ids_BT,
        mask_BT,
        (mask_BT.cumsum(1) - 1).clamp(min=0),
        [np.random.default_rng(seeds[n]) for n in of],
        torch.tensor([temperatures[n] for n in of], device=model.device)[:, None],
        [*range(len(prompts)), *[None] * fill],
    )
    of_B = torch.tensor([number[tuple(prompts[n])] for n in of], device=model.device)
    first_BV = rows.logits()[of_B]
    rows.take(of_B)
    return rows, first_BV


@functools.cache
def cache_name(kind: type) -> str:
    """The name of the cache argument in a class of transformers models (renamed after 5.19)."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def left_padded(
    prompts: Sequence[Sequence[int]], width: int, pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both [B, width]; all prompts end in the last column."""
    ids_BT = np.full((len(prompts), width), pad)
    mask_BT = np.zeros((len(prompts), width), int)
    for row, ids in enumerate(prompts):
        ids_BT[row, width - len(ids) :] = ids
        mask_BT[row, width - len(ids) :] = 1
    return torch.from_numpy(ids_BT).long(), torch.from_numpy(mask_BT).long()


def sample_tokens(
    logits_BV: torch.Tensor, temperature_B1: torch.Tensor, noise: Sequence[np.random.Generator]
) -> torch.Tensor:
    """A sample [B] of softmax(logits / T) in each row with its own noise: first a group of GROUP
    tokens, then a token of the group, which needs hundreds of random numbers instead of one a
    token. The most likely token at temperature 0; NOT_A_NUMBER if logits are not finite.

    One random number among the cumulative probabilities would be enough, but rounding would change
    the sample more often, since it moves thousands of boundaries.
    """
    rows, vocabulary = logits_BV.shape
    greedy_B1 = temperature_B1 == 0
    scaled_BV = logits_BV.float() / temperature_B1.masked_fill(greedy_B1, 1.0)
    padded_BV = torch.nn.functional.pad(scaled_BV.softmax(-1), (0, -vocabulary % GROUP))
    p_BGN = padded_BV.view(rows, -1, GROUP)
    p_BG = p_BGN.sum(-1)
    groups = p_BG.shape[1]
    noise_BE = np.stack([one.standard_exponential(groups + GROUP, np.float32) for one in noise])
    # Above 0: a token with probability 0 is never 0 / 0, and p / E is finite.
    noise_BE = torch.from_numpy(noise_BE).to(logits_BV.device).clamp(min=1e-30)
    group_B = (p_BG / noise_BE[:, :groups]).argmax(-1)
    p_BN = p_BGN[torch.arange(rows, device=group_B.device), group_B]
    next_B = group_B * GROUP + (p_BN / noise_BE[:, groups:]).argmax(-1)
    if greedy_B1.any():
        next_B = torch.where(greedy_B1.squeeze(1), logits_BV.argmax(-1), next_B)
    return next_B.where(p_BG.sum(-1).isfinite(), NOT_A_NUMBER)
