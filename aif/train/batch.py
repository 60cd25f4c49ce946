"""The sequences of each optimizer step, and their layout in memory.

Step k of a run is a pure function of (rows, settings, k). So the data order needs no state, and a
resumed run goes on in the middle of an epoch with the same rows as an uninterrupted one.

Each step's rows are a uniform draw. They are sorted by length and cut into micro-batches within a
step only. This saves padding, and no step has only short or only long rows, as it does if rows are
grouped by length across steps.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from aif.train.tokens import TokenRow

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences that run in one forward pass.

    Padded: pads on the right, `position_ids` None. No attention mask is needed: causal attention
    sees nothing later, and padding has no loss.
    Packed: B = 1, and `position_ids` start from 0 with every sequence, by which transformers
    separates them (`masking_utils.find_packed_sequence_indices`, and the flash-attention path).
    With shared prefixes: `branch` as `prefix_mask` has it; else None.
    """

    input_ids: torch.Tensor  # [B, T]
    loss_mask: torch.Tensor  # [B, T], True where the token itself is learned
    position_ids: torch.Tensor | None  # [B, T]
    branch: torch.Tensor | None = None  # [B, T]

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor | None]:
        """The keyword arguments of `logprobs.nll_loss` and `ActorCritic.forward`, on `device`."""
        tensors = {"input_ids": self.input_ids, "loss_mask": self.loss_mask}
        tensors |= {"position_ids": self.position_ids, "branch": self.branch}
        return {k: None if v is None else v.to(device) for k, v in tensors.items()}


@dataclass(frozen=True)
class OptimizerStep:
    """What one optimizer step learns from."""

    batches: list[Any]  # each with `inputs(device)`: the keyword arguments of the model's forward
    tokens: int  # without padding
    loss_items: int  # learned tokens, for example: the batches' summed losses are divided by it


@dataclass(frozen=True)
class Layout:
    """How rows become micro-batches of at most `micro_tokens` positions (or one longer row)."""

    micro_tokens: int
    packing: bool
    pad_id: int
    call_tokens: int = 64  # the fixed cost of a micro-batch, in tokens

    def step(self, rows: Sequence[TokenRow]) -> OptimizerStep:
        """All of `rows`, the longest first."""
        learned = sum(int(row.loss_mask_T.sum()) for row in rows)
        return OptimizerStep(
            [batch for _, batch in self.batches(rows)], sum(map(len, rows)), learned
        )

    def batches(self, rows: Sequence[TokenRow]) -> Iterator[tuple[list[TokenRow], Batch]]:
        """The micro-batches of `rows`, each with its rows."""
        for group in self.groups(rows):
            yield group, self.batch(group)

    def groups(self, rows: Sequence[TokenRow]) -> list[list[TokenRow]]:
        """The rows of each micro-batch: sorted by length, cut where it costs least.

        A micro-batch costs its positions, padding included, and `call_tokens`.
        """
        rows = sorted(rows, key=len, reverse=True)
        total = [0, *accumulate(map(len, rows))]

        def size(start: int, end: int) -> int:
            packed = total[end] - total[start]
            return packed if self.packing else (end - start) * len(rows[start])

        return cheapest_cuts(rows, size, self.micro_tokens, self.call_tokens)

    def batch(self, rows: Sequence[TokenRow]) -> Batch:
        """These rows in one micro-batch."""
        if self.packing:
            position_ids = np.concatenate([np.arange(len(row)) for row in rows])
            return Batch(
                _tensor(np.concatenate([row.ids_T for row in rows])[None]),
                _tensor(np.concatenate([row.loss_mask_T for row in rows])[None], torch.bool),
                _tensor(position_ids[None]),
            )
        width = max(map(len, rows))
        ids_BT = np.full((len(rows), width), self.pad_id)
        mask_BT = np.zeros((len(rows), width), bool)
        for n, row in enumerate(rows):
            ids_BT[n, : len(row)] = row.ids_T
            mask_BT[n, : len(row)] = row.loss_mask_T
        return Batch(_tensor(ids_BT), _tensor(mask_BT, torch.bool), None)


def cheapest_cuts(
    rows: list[R], size: Callable[[int, int], int], most: int, call: int
) -> list[list[R]]:
    """`rows` cut into runs so that the sum of size(start, end) + `call` of all runs is least.

    No run is larger than `most` unless it is one row; `size` may not fall as a run grows.
    """
    cost, cut = [0], [0]  # of the first n rows; where their last run begins
    for end in range(1, len(rows) + 1):
        choices = []
        for start in range(end - 1, -1, -1):
            positions = size(start, end)
            if positions > most and choices:
                break
            choices.append((cost[start] + positions + call, start))
        best = min(choices)
        cost.append(best[0])
        cut.append(best[1])
    runs, end = [], len(rows)
    while end:
        runs.append(rows[cut[end] : end])
        end = cut[end]
    return runs[::-1]


def _tensor(array: np.ndarray, dtype: torch.dtype = torch.long) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)


class Layouts(Protocol):
    """How rows of one kind lie in memory; each has a `source`."""

    micro_tokens: int

    def step(self, rows: Sequence[Any]) -> OptimizerStep: ...


class Steps(torch.utils.data.Dataset):
    """All optimizer steps of a run; item k is step k."""

    def __init__(
        self,
        rows: Sequence[Any],
        weights: Mapping[str, float],
        layout: Layouts,
        *,
        batch_size: int,
        epochs: float,
        max_steps: int | None,
        seed: int,
    ):
        self.rows, self.layout, self.seed, self.batch_size = rows, layout, seed, batch_size
        self._by_source: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            self._by_source.setdefault(row.source, []).append(number)
        self._weights = weights
        self._max_steps, self._epochs = max_steps, epochs
        self._epoch = lru_cache(maxsize=2)(self._order)

    @cached_property
    def per_epoch(self) -> int:
        """Steps in an epoch; the last one may have fewer rows."""
        return math.ceil(len(self._epoch(0)) / self.batch_size)

    def __len__(self) -> int:
        return self._max_steps or math.ceil(self._epochs * self.per_epoch)

    def __getitem__(self, k: int) -> OptimizerStep:
        rows = [self.rows[n] for n in self.numbers(k)]
        return self.layout.step(rows)

    def numbers(self, k: int) -> list[int]:
        """The rows of step k."""
        epoch, step = divmod(k, self.per_epoch)
        return self._epoch(epoch)[step * self.batch_size : (step + 1) * self.batch_size]

    def _order(self, epoch: int) -> list[int]:
        """The rows of an epoch, shuffled. A source of weight 1.3 has all rows once and 30 % of them
        twice."""
        order: list[int] = []
        for source, numbers in self._by_source.items():
            share, times = math.modf(self._weights.get(source, 1.0))
            order += numbers * int(times)
            draw = random.Random(f"{self.seed} draw {epoch} {source}")
            order += draw.sample(numbers, max(1, round(share * len(numbers))) if share else 0)
        random.Random(f"{self.seed} shuffle {epoch}").shuffle(order)
        return order
