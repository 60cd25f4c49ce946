"""The scores of responses: the reward model, a judge, any function, or a weighted sum of them.

    [ppo.reward]
    model = 1.0                    # the run's reward model, or its ensemble
    judge = 0.2                    # the run's judge under its constitution, asked during training
    "rewards.py:brevity" = 0.1     # rewards.brevity(prompts, responses)

A function takes prompts (lists of messages) and responses (texts). It returns a number for each, or
None: PPO does not learn from such a response.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from accelerate import PartialState

from aif.errors import AifError, InputError, shown
from aif.store.records import Message, content_id
from aif.train.distributed import all_gather, on_main_process
from aif.train.reward.model import Ensemble

RewardFunction = Callable[[Sequence[list[Message]], Sequence[str]], Sequence[float | None]]
PROBE = [{"role": "user", "content": "What is the capital of France?"}]


class ModelReward:
    """A reward model or an ensemble of reward models.

    The score of a single model is as it is, or normalised with `normalise`. An ensemble's scores
    are normalised before they are combined.
    """

    def __init__(self, ensemble: Ensemble, normalise: bool):
        self.ensemble, self.normalise = ensemble, normalise and len(ensemble.members) == 1

    def __call__(
        self, prompts: Sequence[list[Message]], responses: Sequence[str]
    ) -> list[float | None]:
        """A score for each response; None if it does not fit with its prompt."""
        groups = [(prompt, [text]) for prompt, text in zip(prompts, responses, strict=True)]
        scores = [row[0] for row in self.ensemble.scores(groups)]
        if not self.normalise:
            return scores
        (member,) = self.ensemble.members
        return [None if score is None else member.normalised(score) for score in scores]


class WeightedRewards:
    """The weighted sum of named rewards: PPO's score of a response.

    `means` are the means of each reward over the responses of the last call with a number.
    """

    def __init__(self, parts: Mapping[str, tuple[RewardFunction, float]]):
        self.parts = parts
        self.means: dict[str, float] = {}

    @property
    def models(self) -> list[Any]:
        """The reward models, which use memory in this process."""
        rewards = [reward for reward, _ in self.parts.values() if isinstance(reward, ModelReward)]
        return [member.model for reward in rewards for member in reward.ensemble.members]

    def __call__(
        self, prompts: Sequence[list[Message]], responses: Sequence[str]
    ) -> list[float | None]:
        """The score of each response; None if one of the rewards has no number."""
        scores: list[float | None] = [0.0] * len(responses)
        self.means = {}
        for name, (reward, weight) in self.parts.items():
            values = checked(name, reward(prompts, responses), len(responses))
            numbers = [value for value in values if value is not None]
            if numbers:
                self.means[name] = sum(numbers) / len(numbers)
            scores = [
                None if score is None or value is None else score + weight * value
                for score, value in zip(scores, values, strict=True)
            ]
        return scores


def called_on_main_process(reward: RewardFunction) -> RewardFunction:
    """A reward with a journal, which has one writer: the main process calls it for all."""

    def call(prompts: Sequence[list[Message]], responses: Sequence[str]) -> Any:
        shares = all_gather((list(prompts), list(responses)))
        values = on_main_process(lambda: [reward(*share) for share in shares])
        return values[PartialState().process_index]

    call.identity = getattr(reward, "identity", None)
    return call


def checked(name: str, values: Any, count: int) -> list[float | None]:
    """The values of the reward `name` as floats and Nones. Raises AifError for anything but
    `count` finite numbers or Nones."""
    items = values.tolist() if hasattr(values, "tolist") else values
    expected = f"expected {count} numbers or None, one a response"
    if not isinstance(items, Iterable) or isinstance(items, str | bytes | Mapping | Set):
        raise AifError(f"reward {name}: got {shown(values)}, {expected}")
    # Numbers of numpy and torch need not be Python's.
    items = [item.tolist() if hasattr(item, "tolist") else item for item in items]
    if len(items) != count:
        raise AifError(f"reward {name}: got {len(items)} values, {expected}")
    for item in items:
        if item is not None and not isinstance(item, int | float):
            shape = getattr(values, "shape", None)
            got = f"shape {tuple(shape)}" if shape is not None else shown(item)
            raise AifError(f"reward {name}: got {got}, {expected}")
        if item is not None and not math.isfinite(item):
            raise AifError(f"reward {name}: got {item}, {expected}")
    return [None if item is None else float(item) for item in items]


def load_reward(spec: str, key: str, sources: Mapping[str, RewardFunction]) -> RewardFunction:
    """The reward of `sources` with the name `spec`, or the function MODULE:FUNCTION of an
    importable module or a .py file; `key` is the setting's.

    The function is called once, so a wrong one fails before any work. Raises InputError without
    such a function; its own errors become AifError, since they are not ours.
    """
    if spec in sources:
        return sources[spec]
    module_name, _, name = spec.rpartition(":")
    if not module_name or not name.isidentifier():
        names = "model, judge" if key == "reward" else "judge"
        raise InputError("ppo", key, got=shown(spec), expected=f"{names} or MODULE:FUNCTION")
    try:
        function = getattr(_module(module_name), name)
    except Exception as error:  # a module may do anything when it is loaded
        got = f"{shown(spec)} ({type(error).__name__}: {error})"
        raise InputError("ppo", key, got=got, expected="a function") from error
    if not callable(function):
        got = f"{shown(spec)}, {type(function).__name__}"
        raise InputError("ppo", key, got=got, expected="a function")

    @functools.wraps(function)
    def call(prompts: Sequence[list[Message]], responses: Sequence[str]) -> Any:
        try:
            return function(prompts, responses)
        except Exception as error:
            raise AifError(f"reward {spec}: raised {type(error).__name__}: {error}") from error

    call.identity = _source_digest(function)
    checked(spec, call([PROBE, PROBE], ["Paris.", "I do not know."]), 2)
    return call


def _source_digest(function: Any) -> str | None:
    """The digest of the function's file: an edited function is another reward."""
    try:
        return content_id("source", Path(inspect.getsourcefile(function)).read_text("utf-8"))
    except (OSError, TypeError):
        return None


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        if "" not in sys.path:
            sys.path.insert(0, "")
        return importlib.import_module(name)
    path = Path(name).expanduser()
    spec = importlib.util.spec_from_file_location(f"aif_ppo_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up the module of their annotations
    spec.loader.exec_module(module)
    return module
