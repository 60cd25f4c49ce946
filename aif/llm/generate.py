"""Sampled and greedy text from a causal language model, the same whoever else is in the batch.

Two things make a row's text its own. Its noise comes from its own generator, seeded by the ask
(Gumbel-max: argmax(logits / T + Gumbel noise) is a draw from softmax(logits / T)). And its shapes
come from its own length: prompts are padded to a multiple of 16 and batched only with prompts
padded to the same length, so the kernels sum in the same order in every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

BUCKET = 16  # tokens
ROWS_CPU, ROWS_CUDA = 16, 64
# A float32 product of 1 to 11 rows may take another kernel, which sums in another order, unless
# the rows are a multiple of 4 (measured: MKL, AVX-512, one and two threads; bfloat16 never does).
ROW_STEP = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Draw:
    """One text to make: a prompt's tokens, and how to sample."""

    ids: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int

    @property
    def width(self) -> int:
        """The padded prompt length: always a pad or more, so that the mask is never left out
        (transformers drops an all-true mask, and then another kernel runs)."""
        return (len(self.ids) // BUCKET + 1) * BUCKET


@dataclass(frozen=True, slots=True)
class Drawn:
    """The new tokens of one draw, EOS included when it `stopped`."""

    ids: tuple[int, ...]
    stopped: bool


def generate(
    model: Any, draws: list[Draw], eos: set[int], pad: int
) -> Iterator[tuple[int, Drawn | RuntimeError]]:
    """(index into `draws`, what came of it) for every draw, in batches of like lengths."""
    rows = ROWS_CUDA if model.device.type == "cuda" else ROWS_CPU
    like: dict[tuple[int, int], list[int]] = {}
    for i, draw in enumerate(draws):
        like.setdefault((draw.width, draw.max_tokens), []).append(i)
    for _, members in sorted(like.items()):
        for start in range(0, len(members), rows):
            part = members[start : start + rows]
            yield from halving(lambda some: _batch(model, [draws[i] for i in some], eos, pad), part)


def halving(
    run: Callable[[list[Item]], list[Result]], items: list[Item], tries: int = 2
) -> list[tuple[Item, Result | RuntimeError]]:
    """`run(items)`, in halves and then quarters when the device has not the memory for all."""
    try:
        return list(zip(items, run(items), strict=True))
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        failure = error.with_traceback(None)  # the traceback's frames would hold the tensors
    if tries == 0 or len(items) == 1:
        return [(item, failure) for item in items]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(items) // 2
    return [
        *halving(run, items[:middle], tries - 1),
        *halving(run, items[middle:], tries - 1),
    ]


@torch.inference_mode()
def _batch(model: Any, draws: list[Draw], eos: set[int], pad: int) -> list[Drawn | RuntimeError]:
    """Draws of one width and one max_tokens, together."""
    step = ROWS_CUDA if model.device.type == "cuda" else ROW_STEP
    rows = draws + [draws[-1]] * (-len(draws) % step)
    width = draws[0].width
    ids_BT = torch.full((len(rows), width), pad)
    mask_BT = torch.zeros_like(ids_BT)
    for row, draw in enumerate(rows):
        ids_BT[row, width - len(draw.ids) :] = torch.tensor(draw.ids)
        mask_BT[row, width - len(draw.ids) :] = 1
    noise = GumbelNoise(rows, model.device)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=draws[0].max_tokens,
        eos_token_id=sorted(eos) or None,
        pad_token_id=pad,
    )
    out_BT = model.generate(
        ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        generation_config=settings,
        logits_processor=LogitsProcessorList([noise]),
    )
    new = [_cut(row, eos, draws[0].max_tokens) for row in out_BT[:, width:].tolist()]
    broken = noise.broken_B.tolist()
    return [
        RuntimeError("the model's logits are not numbers") if broken[i] else new[i]
        for i in range(len(draws))
    ]


def _cut(ids: list[int], eos: set[int], max_tokens: int) -> Drawn:
    """`ids` up to and including the first EOS; what follows is padding."""
    for i, token in enumerate(ids[:max_tokens]):
        if token in eos:
            return Drawn(tuple(ids[: i + 1]), stopped=True)
    return Drawn(tuple(ids[:max_tokens]), stopped=False)


class GumbelNoise(LogitsProcessor):
    """Adds each row's own noise, so that a greedy choice is a sample at the row's temperature.

    Temperature 0 adds none. See Maddison et al. 2014, A* sampling, section 2.
    """

    def __init__(self, rows: list[Draw], device: torch.device):
        self.temperatures = [draw.temperature for draw in rows]
        self.generators = [torch.Generator(device).manual_seed(draw.seed) for draw in rows]
        self.broken_B = torch.zeros(len(rows), dtype=torch.bool, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores_BV = scores.float().clone()
        self.broken_B |= scores_BV.isnan().any(-1)
        for row, temperature in enumerate(self.temperatures):
            if temperature > 0:
                noise_V = torch.empty_like(scores_BV[row])
                noise_V.exponential_(generator=self.generators[row])
                scores_BV[row] = scores_BV[row] / temperature - noise_V.log()
        return scores_BV.nan_to_num(nan=0.0)
