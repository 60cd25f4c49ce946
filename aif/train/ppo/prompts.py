"""The prompts that PPO trains on, in tokens; some are held out for evaluation.

They come from `ppo.prompts`, else from the run's prompts.jsonl, else from `respond.prompts`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from aif.config.settings import PPOSettings
from aif.data.readers import read_prompts
from aif.errors import AifError, InputError
from aif.run import Run
from aif.store.records import Message, Prompt
from aif.train.examples import held_out, split_key
from aif.train.tokens import Tokeniser


@dataclass(frozen=True, slots=True)
class PolicyPrompt:
    """A prompt as text and as the tokens that the policy gets."""

    id: str
    messages: list[Message]
    ids_T: np.ndarray  # int32; the oldest turns may be missing


class PromptStream:
    """The prompts of each step: item k depends on the seed and on k only.

    Every epoch has each prompt once, in an order of its own. A step may begin in one epoch and end
    in the next, so all steps have `batch_size` prompts.
    """

    def __init__(self, prompts: Sequence[PolicyPrompt], settings: PPOSettings):
        self._prompts, self._seed = prompts, settings.seed
        self._size = settings.batch_size
        self._steps = settings.max_steps or math.ceil(
            round(settings.epochs * len(prompts) / self._size, 6)  # 1.1 * 10 / 11 is 1
        )
        self._epoch = lru_cache(maxsize=2)(self._order)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, k: int) -> list[PolicyPrompt]:
        places = range(k * self._size, (k + 1) * self._size)
        turns = (divmod(place, len(self._prompts)) for place in places)
        return [self._prompts[self._epoch(epoch)[n]] for epoch, n in turns]

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(f"{self._seed} prompts {epoch}").shuffle(order)
        return order


def training_prompts(run: Run) -> list[Prompt]:
    """The distinct prompts for PPO. Raises InputError without any."""
    source = run.settings.ppo.prompts
    if source is None and run.file("prompts.jsonl").exists():
        prompts = run.read("prompts.jsonl", Prompt)
    else:
        source = source or run.settings.respond.prompts
        if source is None:
            raise InputError("ppo", "prompts", got="nothing", expected="--prompts FILE")
        prompts = read_prompts(source)
    distinct = list({prompt.id: prompt for prompt in prompts}.values())
    if not distinct:
        raise InputError("ppo", "prompts", got="no prompts at all", expected="at least one")
    return distinct


def split_prompts(
    prompts: Sequence[Prompt], tokeniser: Tokeniser, settings: PPOSettings, response_tokens: int
) -> tuple[list[PolicyPrompt], list[PolicyPrompt]]:
    """(to train on, held out), of the prompts that fit with `response_tokens` for a response.

    Raises AifError if none fits.
    """
    ids = tokeniser.prompts([prompt.messages for prompt in prompts], response_tokens)
    fit = [
        PolicyPrompt(prompt.id, prompt.messages, ids_T)
        for prompt, ids_T in zip(prompts, ids, strict=True)
        if ids_T is not None
    ]
    if not fit:
        raise AifError(
            f"ppo: none of {len(prompts):,} prompts leaves room for {response_tokens:,} tokens of "
            f"a response within {tokeniser.max_tokens:,} (ppo.max_tokens)"
        )
    keys = {prompt.id: split_key(prompt.messages) for prompt in fit}
    out = held_out(keys.values(), settings.eval_fraction, settings.seed)
    train = [prompt for prompt in fit if keys[prompt.id] not in out]
    return train, [prompt for prompt in fit if keys[prompt.id] in out]
