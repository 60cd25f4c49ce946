"""Sampled and greedy text from a causal language model, the same whoever else is in the batch.

Two things make a row's text its own. Its noise comes from its own generator, seeded by the ask
(Gumbel-max: argmax(logits / T + Gumbel noise) is a draw from softmax(logits / T)). And its shapes
come from its own length: prompts are padded to one of a few widths and batched only with prompts
padded to the same width, so the kernels sum in the same order in every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

NARROWEST = 16  # tokens between two widths, and a quarter to an eighth of them where that is more
# Rows of a batch: 64 short texts run a quarter to a third faster than 16 on a CPU, 64 long ones
# would lose more when they are interrupted.
ROWS_CPU, TOKENS_CPU, ROWS_CUDA = 16, 8192, 64
# A float32 product of 1 to 11 rows may take another kernel, which sums in another order, unless
# the rows are a multiple of 4 (measured: MKL, AVX-512, one and two threads; bfloat16 never does).
ROW_STEP = 4

TextOf = Callable[[Sequence[int]], str]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Draw:
    """One text to make: a prompt's tokens, and how to sample."""

    ids: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int
    stop: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """The padded prompt length: always a pad or more, so that the mask is never left out
        (transformers drops an all-true mask, and then another kernel runs)."""
        step = max(NARROWEST, 1 << len(self.ids).bit_length() >> 3)
        return (len(self.ids) // step + 1) * step


@dataclass(frozen=True, slots=True)
class Drawn:
    """The new tokens of one draw, with the EOS or stop string at which it `stopped`."""

    ids: tuple[int, ...]
    stopped: bool


def generate(
    model: Any, draws: list[Draw], eos: set[int], pad: int, text_of: TextOf
) -> Iterator[tuple[int, Drawn | RuntimeError]]:
    """(index into `draws`, what came of it) for every draw, in batches of like lengths."""

    def run(some: list[int]) -> list[Drawn | RuntimeError]:
        return _batch(model, [draws[i] for i in some], eos, pad, text_of)

    like: dict[tuple[int, int], list[int]] = {}
    for i, draw in enumerate(draws):
        like.setdefault((draw.width, draw.max_tokens), []).append(i)
    for (width, new), members in sorted(like.items()):
        rows = ROWS_CUDA
        if model.device.type != "cuda":
            rows = min(max(TOKENS_CPU // (width + new), ROWS_CPU), ROWS_CUDA)
        for start in range(0, len(members), rows):
            yield from halving(run, members[start : start + rows])


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
def _batch(
    model: Any, draws: list[Draw], eos: set[int], pad: int, text_of: TextOf
) -> list[Drawn | RuntimeError]:
    """Draws of one width and one max_tokens, together."""
    step = ROWS_CUDA if model.device.type == "cuda" else ROW_STEP
    rows = draws + [draws[-1]] * (-len(draws) % step)
    width = draws[0].width
    ids_BT = torch.full((len(rows), width), pad)
    mask_BT = torch.zeros_like(ids_BT)
    for row, draw in enumerate(rows):
        ids_BT[row, width - len(draw.ids) :] = torch.tensor(draw.ids)
        mask_BT[row, width - len(draw.ids) :] = 1
    noise, stops = GumbelNoise(rows, model.device), StopStrings(rows, width, text_of)
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
        stopping_criteria=StoppingCriteriaList([stops]) if stops.needed else None,
    )
    new = [
        _cut(ids, eos, ended)
        for ids, ended in zip(out_BT[:, width:].tolist(), stops.ended_at, strict=True)
    ]
    broken = noise.broken_B.tolist()
    return [
        RuntimeError("the model's logits are not numbers") if broken[i] else new[i]
        for i in range(len(draws))
    ]


def _cut(ids: list[int], eos: set[int], ended: int | None) -> Drawn:
    """`ids` up to the stop string or including the first EOS; what follows is padding."""
    for i, token in enumerate(ids[:ended]):
        if token in eos:
            return Drawn(tuple(ids[: i + 1]), stopped=True)
    return Drawn(tuple(ids[:ended]), stopped=ended is not None)


class StopStrings(StoppingCriteria):
    """Ends each row whose new text has come to one of its stop strings.

    It reads the end of the text, not tokens: a stop string is seldom made of the same tokens twice.
    """

    def __init__(self, rows: list[Draw], width: int, text_of: TextOf):
        self.needed = any(draw.stop for draw in rows)
        self.ended_at: list[int | None] = [None] * len(rows)
        self._rows, self._width, self._text_of = rows, width, text_of

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        for row, draw in enumerate(self._rows):
            if not draw.stop or self.ended_at[row] is not None:
                continue
            # A token is a byte or more, so no stop string reaches back further.
            reach = max(len(stop.encode()) for stop in draw.stop)
            new = input_ids[row, self._width :][-reach:].tolist()
            if any(stop in self._text_of(new) for stop in draw.stop):
                self.ended_at[row] = input_ids.shape[1] - self._width
        return torch.tensor([end is not None for end in self.ended_at], device=input_ids.device)


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
