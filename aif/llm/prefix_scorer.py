"""Next-token log-probabilities of many prompts, with each shared prefix computed once.

Two prompts share all tokens that both begin with: a preamble, a pair of texts before four
questions. `PrefixScorer` finds these by itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from aif.llm.sampler import halving
from aif.models.decode import cache_name


@dataclass(frozen=True, slots=True)
class Limits:
    """How many tokens are in memory at once."""

    batch: int  # in one forward pass
    kept: int  # keys and values: of one group of prompts, of one batch, and between groups


CPU, CUDA = Limits(batch=256, kept=8192), Limits(batch=2048, kept=32768)
BLOCK = 32  # tokens of a prefix computed (and shared) together
WIDTH = 16  # the rest of a prompt is padded to a multiple of this

TokenIds = tuple[int, ...]


class PrefixScorer:
    """Next-token log-probabilities of many prompts; shared prefixes are computed once.

    A prompt is cut into blocks of 32 tokens and a rest of 1 to 32. A block's keys and values depend
    only on the tokens up to its end, so prompts share the blocks of their common prefix; the idea
    is vLLM's automatic prefix caching (https://docs.vllm.ai/en/latest/design/prefix_caching.html).
    The blocks used last are kept for later prompts.

    Every shape but the number of rows follows from the prompt alone: 32 tokens after a multiple of
    32, then 16 or 32 after a multiple of 32. So a prompt's result is the same to the bit in every
    batch, if a matrix product treats its rows alike. CPU kernels do from 12 rows on (measured: MKL
    and oneDNN, AVX-512, one and two threads), and here there are at least 16; on CUDA, where the
    kernel depends on the number of rows, batches are filled up.
    """

    def __init__(self, model: Any):
        self.model = model
        self.cuda = model.device.type == "cuda"
        self.limits = CUDA if self.cuda else CPU
        self.blocks: OrderedDict[TokenIds, torch.Tensor] = OrderedDict()  # prefix -> kv_L2HCD

    @torch.inference_mode()
    def next_logprobs(
        self, prompts: list[TokenIds]
    ) -> Iterator[tuple[int, torch.Tensor | RuntimeError]]:
        """(index into `prompts`, float32 log-probabilities [vocabulary], in nats) for each."""
        for group in self._groups(prompts):
            yield from self._score_group(prompts, group)
            while len(self.blocks) * BLOCK > self.limits.kept:
                self.blocks.popitem(last=False)

    def _groups(self, prompts: list[TokenIds]) -> Iterator[list[int]]:
        """Indices in sorted order, so that shared prefixes stand together, in groups that fit in
        memory."""
        group: list[int] = []
        size, before = 0, ()
        for i in sorted(range(len(prompts)), key=prompts.__getitem__):
            new = len(prompts[i]) - _common(prompts[i], before)
            if group and size + new > self.limits.kept:
                yield group
                group, size = [], 0
            group.append(i)
            size, before = size + new, prompts[i]
        if group:
            yield group

    def _score_group(
        self, prompts: list[TokenIds], group: list[int]
    ) -> Iterator[tuple[int, torch.Tensor | RuntimeError]]:
        """Goes down all prompts of a group at once, block by block, yielding those that end."""
        chains: dict[int, list[torch.Tensor]] = {i: [] for i in group}
        past = 0
        while chains:
            ends = [i for i in chains if len(prompts[i]) <= past + BLOCK]
            for width in (WIDTH, BLOCK):
                fits = [i for i in ends if past + width - WIDTH < len(prompts[i]) <= past + width]
                for batch in self._batches(fits, width, past):
                    yield from halving(
                        lambda some, w=width: self._ends(prompts, some, chains, w), batch
                    )
            for i in ends:
                del chains[i]
            failed = self._extend(prompts, chains, past)
            for i, error in failed.items():
                del chains[i]
                yield i, error
            past += BLOCK

    def _extend(
        self, prompts: list[TokenIds], chains: dict[int, list[torch.Tensor]], past: int
    ) -> dict[int, RuntimeError]:
        """Gives every chain its next block, computing those not kept; returns the failures."""
        first: dict[TokenIds, int] = {}  # a prompt for each block that is missing
        for i in chains:
            prefix = prompts[i][: past + BLOCK]
            if prefix in self.blocks:
                self.blocks.move_to_end(prefix)
            else:
                first.setdefault(prefix, i)
        errors: dict[TokenIds, RuntimeError] = {}
        for batch in self._batches(list(first), BLOCK, past):
            blocks = halving(
                lambda some: self._blocks(some, [chains[first[p]] for p in some]), batch
            )
            for prefix, block in blocks:
                (errors if isinstance(block, RuntimeError) else self.blocks)[prefix] = block
        failed = {}
        for i, chain in chains.items():
            prefix = prompts[i][: past + BLOCK]
            if prefix in errors:
                failed[i] = errors[prefix]
            else:
                chain.append(self.blocks[prefix])
        return failed

    def _rows(self, width: int, past: int) -> int:
        """Rows of a full batch; depends on the shape alone."""
        return max(1, min(self.limits.batch // width, self.limits.kept // (past + width)))

    def _batches(self, items: list[Any], width: int, past: int) -> Iterator[list[Any]]:
        rows = self._rows(width, past)
        for start in range(0, len(items), rows):
            yield items[start : start + rows]

    def _blocks(
        self, prefixes: list[TokenIds], chains: list[list[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """The keys and values (kv_L2HCD) of the last block of each prefix."""
        _, cache = self._forward([prefix[-BLOCK:] for prefix in prefixes], chains, last=None)
        new = [torch.stack((y.keys, y.values))[..., -BLOCK:, :] for y in cache.layers]
        kv_L2RHCD = torch.stack(new)
        return [kv_L2RHCD[:, :, row].clone() for row in range(len(prefixes))]

    def _ends(
        self, prompts: list[TokenIds], some: list[int], chains: dict[int, list], width: int
    ) -> list[torch.Tensor]:
        """The log-probabilities [vocabulary] after each prompt, from its last piece."""
        pieces = [prompts[i][len(chains[i]) * BLOCK :] for i in some]
        # Padding on the right needs no mask: a causal model's real tokens never attend to it.
        padded = [piece + (0,) * (width - len(piece)) for piece in pieces]
        last = [len(piece) - 1 for piece in pieces]
        out, _ = self._forward(padded, [chains[i] for i in some], last)
        logits_RV = out.logits[: len(some), 0]
        return list(logits_RV.float().log_softmax(-1).cpu())

    def _forward(
        self, pieces: list[TokenIds], chains: list[list[torch.Tensor]], last: list[int] | None
    ) -> tuple[Any, DynamicCache]:
        """Runs `pieces` (all of one width) after their chains of blocks (all of one length).

        Returns the model's output and the cache with the keys and values of the pieces. With
        `last`, the output has logits [rows, 1, vocabulary] at that position of each piece.
        """
        past, width = len(chains[0]) * BLOCK, len(pieces[0])
        more = self._rows(width, past) - len(pieces) if self.cuda else 0
        ids_RT = torch.tensor(pieces + [pieces[-1]] * more, device=self.model.device)
        positions_RT = torch.arange(past, past + width, device=ids_RT.device).expand_as(ids_RT)
        cache = _cache(chains + [chains[-1]] * more, width)
        inputs = {
            "input_ids": ids_RT,
            "position_ids": positions_RT,
            cache_name(type(self.model)): cache,
            "use_cache": True,
        }
        if last is None:
            return self.model.base_model(**inputs), cache
        with _LastOnly(self.model, last, rows=self.limits.batch // WIDTH):
            return self.model(**inputs), cache


def _common(a: TokenIds, b: TokenIds) -> int:
    """The length of the common prefix of `a` and `b`."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _cache(chains: list[list[torch.Tensor]], width: int) -> DynamicCache:
    """A cache with each row's chain of blocks and room for `width` tokens more."""
    cache = DynamicCache()
    if not chains[0]:
        return cache
    layers, _, heads, block, size = chains[0][0].shape
    past = len(chains[0]) * block
    kv_L2RHTD = chains[0][0].new_empty(layers, 2, len(chains), heads, past + width, size)
    for row, chain in enumerate(chains):
        for n, kv_L2HCD in enumerate(chain):
            kv_L2RHTD[:, :, row, :, n * block : (n + 1) * block] = kv_L2HCD
    cache.layers = [_Roomy(kv_2RHTD, past) for kv_2RHTD in kv_L2RHTD]
    return cache


class _Roomy(DynamicLayer):
    """A cache layer with `past` tokens and room for the rest, so that nothing is copied
    (DynamicLayer concatenates)."""

    def __init__(self, kv_2RHTD: torch.Tensor, past: int):
        super().__init__()
        self.keys, self.values = kv_2RHTD
        self.past = past
        self.dtype, self.device = kv_2RHTD.dtype, kv_2RHTD.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys[:, :, self.past :] = key_states
        self.values[:, :, self.past :] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.past


class _LastOnly:
    """In a `with`, the model's head sees one position of each row, and always `rows` rows (the
    first is repeated), because a product of few rows may be summed in another order.

    It is a hook because `logits_to_keep` keeps the same positions of every row, and calling the
    head directly would skip what a model does after it (soft-capping, scaling).
    """

    def __init__(self, model: Any, positions: list[int], rows: int):
        more = rows - len(positions)
        self.head = model.get_output_embeddings()
        self.rows = list(range(len(positions))) + [0] * more
        self.positions = positions + [positions[0]] * more

    def __enter__(self) -> None:
        self.hook = self.head.register_forward_pre_hook(
            lambda _, args: (args[0][self.rows, self.positions][:, None],)
        )

    def __exit__(self, *exc: object) -> None:
        self.hook.remove()
