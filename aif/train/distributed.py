"""Several processes that train one model together, as `accelerate launch` starts them.

    accelerate launch --num_processes 8 --module aif ppo RUN

Each process has a share of a step's rows. All processes make each decision together, since a
process that stops or saves alone leaves the others waiting. Only the main process writes
(`run.Follower`).
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce

from aif.errors import AifError

T = TypeVar("T")


def ends_process_group(stage: Callable[..., T]) -> Callable[..., T]:
    """Make a stage end its process group after its models are gone.

    A DistributedDataParallel that holds the group last deadlocks now and then
    (pytorch/pytorch#56297). After an error the group stays: other processes may be waiting in it,
    and the launcher ends them all.
    """

    @functools.wraps(stage)
    def run(*arguments: Any) -> T:
        summary = stage(*arguments)
        if torch.distributed.is_initialized():
            gc.collect()
            torch.distributed.destroy_process_group()
            PartialState._reset_state()
        return summary

    return run


def any_rank(holds: bool) -> bool:
    """Whether the condition is true in any process; all processes must call this."""
    state = PartialState()
    if state.num_processes == 1:
        return holds
    return bool(reduce(torch.tensor(float(holds), device=state.device), "sum"))


def gather_rows(rows: list[T]) -> list[T]:
    """The rows of all processes, in the order of the ranks; all processes must call this."""
    return gather_object(rows) if PartialState().num_processes > 1 else rows


def all_gather(value: T) -> list[T]:
    """The value of each process, in the order of the ranks; all processes must call this."""
    return gather_rows([value])


def weighted_mean(metrics: dict[str, float], weight: int) -> dict[str, float]:
    """Each metric's mean over the processes, by their weights. All processes must call this, with
    the same names."""
    shares = all_gather((metrics, weight))
    total = sum(weight for _, weight in shares)
    return {name: sum(one[name] * weight for one, weight in shares) / total for name in metrics}


def on_main_process(work: Callable[[], T]) -> T:
    """Run `work()` in the main process only. All processes must call this, and all get its result
    or its AifError."""
    state = PartialState()
    if state.num_processes == 1:
        return work()
    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            outcome = [work()]
        except AifError as error:
            outcome = [error]
    (result,) = broadcast_object_list(outcome)
    if isinstance(result, AifError):
        raise result
    return result
