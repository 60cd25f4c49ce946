"""What the policy is asked in training: prompts in tokens, some held out to watch.

From `ppo.prompts`, or the run's own prompts.jsonl, or `respond.prompts`.
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
    """A prompt as it is read, and as the policy is given it."""

    id: str
    messages: list[Message]
    ids_T: np.ndarray  # int32


class PromptStream:
    """Which prompts each step asks: item k is step k, a function of the seed and k alone.

    Every prompt comes up once an epoch, each in an order of its own; a step may begin in one epoch
    and end in the next, so that all steps are of one size.
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


def prompts_of(
    run: Run, tokeniser: Tokeniser, room: int
) -> tuple[list[PolicyPrompt], list[PolicyPrompt]]:
    """(to learn on, held out to watch), of those that fit with `room` tokens for a response.

    Raises InputError or AifError where none is left.
    """
    settings: PPOSettings = run.settings.ppo
    found = list({prompt.id: prompt for prompt in _read(run)}.values())
    if not found:
        raise InputError("ppo", "prompts", got="no prompts at all", expected="at least one")
    ids = tokeniser.prompts([prompt.messages for prompt in found], room)
    fit = [
        PolicyPrompt(prompt.id, prompt.messages, ids_T)
        for prompt, ids_T in zip(found, ids, strict=True)
        if ids_T is not None
    ]
    if not fit:
        raise AifError(
            f"ppo: none of {len(found):,} prompts leaves room for {room:,} tokens of a response "
            f"within {tokeniser.max_tokens:,} (ppo.max_tokens)"
        )
    keys = {prompt.id: split_key(prompt.messages) for prompt in fit}
    out = held_out(keys.values(), settings.eval_fraction, settings.seed)
    learn = [prompt for prompt in fit if keys[prompt.id] not in out]
    return learn, [prompt for prompt in fit if keys[prompt.id] in out]


def _read(run: Run) -> list[Prompt]:
    named = run.settings.ppo.prompts
    if named is None and run.file("prompts.jsonl").exists():
        return list(run.read("prompts.jsonl", Prompt))
    source = named or run.settings.respond.prompts
    if source is None:
        raise InputError("ppo", "prompts", got="nothing", expected="--prompts FILE")
    return list(read_prompts(source))
