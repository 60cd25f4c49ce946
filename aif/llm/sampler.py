"""Sampled and greedy text from a causal language model, the same in every batch.

A row's text does not depend on the other rows, for two reasons. Its noise comes from its own seed.
Its shapes follow from its own length: prompts are padded to one of a few widths and batched only
with prompts of the same width, so the kernels sum in the same order in every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from aif.llm import Note, no_note
from aif.models.decode import SampledTokens, StopWhen, decode

NARROWEST = 16  # tokens between two widths; for long prompts a quarter to an eighth of the width
# Rows of a batch: 64 short texts run a quarter to a third faster than 16 on a CPU; 64 long ones
# lose more work in an interruption, and take too much memory on a GPU.
ROWS, ROWS_CPU, TOKENS_CPU, TOKENS_CUDA = 64, 16, 8192, 65_536
# A float32 product of 1 to 11 rows may use another kernel, which sums in another order, unless the
# rows are a multiple of 4 (measured: MKL, AVX-512, one and two threads; bfloat16 never does).
ROW_STEP = 4

TextOf = Callable[[Sequence[int]], str]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Draw:
    """One text to generate: a prompt's tokens, and how to sample."""

    ids: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int
    stop: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """The padded prompt length, with at least one pad: transformers drops an all-true mask,
        and then another kernel runs."""
        step = max(NARROWEST, 1 << len(self.ids).bit_length() >> 3)
        return (len(self.ids) // step + 1) * step


def generate(
    model: Any, draws: list[Draw], eos: set[int], pad: int, text_of: TextOf, note: Note = no_note
) -> Iterator[tuple[int, SampledTokens | RuntimeError]]:
    """(index into `draws`, its text or error) for every draw, in batches of equal widths. `note` is
    called with the state of the batch at each token."""

    def run(some: list[int]) -> list[SampledTokens | RuntimeError]:
        return _batch(model, [draws[i] for i in some], eos, pad, text_of, note)

    like: dict[tuple[int, int], list[int]] = {}
    for i, draw in enumerate(draws):
        like.setdefault((draw.width, draw.max_tokens), []).append(i)
    for (width, new), members in sorted(like.items()):
        rows = _rows(model.device.type, width + new)
        for start in range(0, len(members), rows):
            yield from halving(run, members[start : start + rows])


def _rows(device: str, tokens: int) -> int:
    """Rows of a full batch of that many tokens each."""
    least, most = (1, TOKENS_CUDA) if device == "cuda" else (ROWS_CPU, TOKENS_CPU)
    return min(max(most // tokens, least), ROWS)


def halving(
    run: Callable[[list[Item]], list[Result]], items: list[Item], tries: int = 2
) -> list[tuple[Item, Result | RuntimeError]]:
    """`run(items)`; in halves, then quarters, if the device has too little memory for all."""
    try:
        return list(zip(items, run(items), strict=True))
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        failure = error.with_traceback(None)  # its frames would keep the tensors alive
    if tries == 0 or len(items) == 1:
        return [(item, failure) for item in items]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(items) // 2
    return [
        *halving(run, items[:middle], tries - 1),
        *halving(run, items[middle:], tries - 1),
    ]


def _batch(
    model: Any, draws: list[Draw], eos: set[int], pad: int, text_of: TextOf, note: Note
) -> list[SampledTokens | RuntimeError]:
    """Draws of one width and one max_tokens, together."""
    width, new = draws[0].width, draws[0].max_tokens

    def on_token(number: int) -> None:
        note(f"token {number} of {new} of a batch of {len(draws)}")

    # On a GPU the kernel depends on the number of rows, so there batches are always full.
    step = _rows("cuda", width + new) if model.device.type == "cuda" else ROW_STEP
    drawn = decode(
        model,
        [draw.ids for draw in draws],
        seeds=[draw.seed for draw in draws],
        temperatures=[draw.temperature for draw in draws],
        max_tokens=new,
        ends=eos,
        pad=pad,
        width=width,
        step=step,
        stop_when=_at_stops(draws, text_of),
        on_token=on_token,
    )
    broken = RuntimeError("the model's logits are not numbers")
    return [broken if one is None else one for one in drawn]


def _at_stops(draws: Sequence[Draw], text_of: TextOf) -> StopWhen | None:
    """Whether a draw's new text has one of its stop strings; None if no draw has any.

    It reads the end of the text, not tokens: one stop string has many spellings in tokens.
    """
    if not any(draw.stop for draw in draws):
        return None

    def stop_when(index: int, new: Sequence[int]) -> bool:
        stops = draws[index].stop
        # A token is at least one byte, so no stop string begins further back.
        reach = max((len(stop.encode()) for stop in stops), default=0)
        text = text_of(new[-reach:]) if reach else ""
        return any(stop in text for stop in stops)

    return stop_when
