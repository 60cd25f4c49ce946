"""What a response is worth: the reward model, a judge, any function, or a weighted sum of them.

    [ppo.reward]
    model = 1.0                    # the run's reward model, or its ensemble
    judge = 0.2                    # the run's judge under its constitution, asked as we go
    "rewards.py:brevity" = 0.1     # rewards.brevity(prompts, responses)

A function takes prompts (lists of messages) and responses (texts) and gives a number for each, or
None where it has none; such a response is not learned from.
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

Reward = Callable[[Sequence[list[Message]], Sequence[str]], Sequence[float | None]]
PROBE = [{"role": "user", "content": "What is the capital of France?"}]


class ModelReward:
    """A reward model or an ensemble of them; of a single one the score, `normalise`d or as it is.

    An ensemble's scores are normalised before they are combined.
    """

    def __init__(self, ensemble: Ensemble, normalise: bool):
        self.ensemble, self.normalise = ensemble, normalise and len(ensemble.members) == 1

    def __call__(
        self, prompts: Sequence[list[Message]], responses: Sequence[str]
    ) -> list[float | None]:
        """A score a response; None for one that does not fit with its prompt."""
        asked = [(prompt, [text]) for prompt, text in zip(prompts, responses, strict=True)]
        scores = [row[0] for row in self.ensemble.scores(asked)]
        if not self.normalise:
            return scores
        (member,) = self.ensemble.members
        return [None if score is None else member.normalised(score) for score in scores]


class Rewards:
    """Named rewards, weighed and summed.

    `means` has each one's mean over the responses of the last call that it had a number for.
    """

    def __init__(self, parts: Mapping[str, tuple[Reward, float]]):
        self.parts = parts
        self.means: dict[str, float] = {}

    @property
    def models(self) -> list[Any]:
        """The models that take memory in this process."""
        found = [reward for reward, _ in self.parts.values() if isinstance(reward, ModelReward)]
        return [member.model for reward in found for member in reward.ensemble.members]

    def __call__(
        self, prompts: Sequence[list[Message]], responses: Sequence[str]
    ) -> list[float | None]:
        """The weighted sum for each response; None where one of the rewards has none."""
        totals: list[float | None] = [0.0] * len(responses)
        self.means = {}
        for name, (reward, weight) in self.parts.items():
            values = checked(name, reward(prompts, responses), len(responses))
            known = [value for value in values if value is not None]
            if known:
                self.means[name] = sum(known) / len(known)
            totals = [
                None if total is None or value is None else total + weight * value
                for total, value in zip(totals, values, strict=True)
            ]
        return totals


def asked_by_the_first(reward: Reward) -> Reward:
    """A reward whose answers are journalled: of several processes the first asks it for all, since
    a journal has one writer."""

    def asked(prompts: Sequence[list[Message]], responses: Sequence[str]) -> Any:
        shares = all_gather((list(prompts), list(responses)))
        answers = on_main_process(lambda: [reward(*share) for share in shares])
        return answers[PartialState().process_index]

    asked.identity = getattr(reward, "identity", None)
    return asked


def checked(name: str, values: Any, count: int) -> list[float | None]:
    """What a reward gave as a list of floats and Nones; AifError where it is anything else."""
    found = values.tolist() if hasattr(values, "tolist") else values
    expected = f"expected {count} numbers or None, one a response"
    if not isinstance(found, Iterable) or isinstance(found, str | bytes | Mapping | Set):
        raise AifError(f"reward {name}: got {shown(values)}, {expected}")
    # Numbers of numpy and torch, which need not be Python's.
    found = [value.tolist() if hasattr(value, "tolist") else value for value in found]
    if len(found) != count:
        raise AifError(f"reward {name}: got {len(found)} values, {expected}")
    for value in found:
        if value is not None and not isinstance(value, int | float):
            shape = getattr(values, "shape", None)
            got = f"shape {tuple(shape)}" if shape is not None else shown(value)
            raise AifError(f"reward {name}: got {got}, {expected}")
        if value is not None and not math.isfinite(value):
            raise AifError(f"reward {name}: got {value}, {expected}")
    return [None if value is None else float(value) for value in found]


def source_of(spec: str, key: str, sources: Mapping[str, Reward]) -> Reward:
    """The source of that name, or the function that it names; `key` is the setting's."""
    return sources[spec] if spec in sources else function_of(spec, key)


def function_of(spec: str, key: str) -> Reward:
    """The function that MODULE:FUNCTION names, MODULE being importable or a .py file; asked once,
    so that a wrong one is found before any work. Raises InputError.

    What it raises when it is asked comes as AifError: it is no fault of ours.
    """
    module_name, _, name = spec.rpartition(":")
    if not module_name or not name.isidentifier():
        known = "model, judge" if key == "reward" else "judge"
        raise InputError("ppo", key, got=shown(spec), expected=f"{known} or MODULE:FUNCTION")
    try:
        found = getattr(_module(module_name), name)
    except Exception as error:  # a module may do anything when it is loaded
        got = f"{shown(spec)} ({type(error).__name__}: {error})"
        raise InputError("ppo", key, got=got, expected="a function") from error
    if not callable(found):
        got = f"{shown(spec)}, {type(found).__name__}"
        raise InputError("ppo", key, got=got, expected="a function")

    @functools.wraps(found)
    def asked(prompts: Sequence[list[Message]], responses: Sequence[str]) -> Any:
        try:
            return found(prompts, responses)
        except Exception as error:
            raise AifError(f"reward {spec}: raised {type(error).__name__}: {error}") from error

    asked.identity = _source_digest(found)
    checked(spec, asked([PROBE, PROBE], ["Paris.", "I do not know."]), 2)
    return asked


def _source_digest(function: Any) -> str | None:
    """Of the file that a function is written in: an edit makes it another reward."""
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
    sys.modules[spec.name] = module  # where a dataclass looks for what its annotations name
    spec.loader.exec_module(module)
    return module
