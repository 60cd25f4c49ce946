"""Several processes that train one model together, as `accelerate launch` starts them.

    accelerate launch --num_processes 8 --module aif ppo RUN

Each has a share of a step's rows, and every one takes each decision that the others take: a process
that stops or saves alone leaves the others waiting for it. The first one writes (`run.Follower`).
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

Found = TypeVar("Found")


def ends_process_group(stage: Callable[..., Found]) -> Callable[..., Found]:
    """A stage that ends its group of processes once its models are gone: to be the last that holds
    it, as DistributedDataParallel then is, deadlocks now and then (pytorch/pytorch#56297). After an
    error the others may be waiting, and the launcher ends them all."""

    @functools.wraps(stage)
    def run(*arguments: Any) -> Found:
        found = stage(*arguments)
        if torch.distributed.is_initialized():
            gc.collect()
            torch.distributed.destroy_process_group()
            PartialState._reset_state()
        return found

    return run


def any_rank(holds: bool) -> bool:
    """Whether it holds in any process; all have to ask."""
    state = PartialState()
    if state.num_processes == 1:
        return holds
    return bool(reduce(torch.tensor(float(holds), device=state.device), "sum"))


def gather_rows(rows: list[Found]) -> list[Found]:
    """The rows of every process, in their order; all have to ask."""
    return gather_object(rows) if PartialState().num_processes > 1 else rows


def all_gather(found: Found) -> list[Found]:
    """What each process has found, in their order; all have to ask."""
    return gather_rows([found])


def weighted_mean(told: dict[str, float], weight: int) -> dict[str, float]:
    """Each figure's mean over the processes, each of them with its weight; all have to ask, with
    the same names."""
    shares = all_gather((told, weight))
    total = sum(weight for _, weight in shares)
    return {name: sum(one[name] * weight for one, weight in shares) / total for name in told}


def on_main_process(work: Callable[[], Found]) -> Found:
    """What `work()` returns or raises (an AifError) in the first process, in all of them."""
    state = PartialState()
    if state.num_processes == 1:
        return work()
    told: list[Any] = [None]
    if state.is_main_process:
        try:
            told = [work()]
        except AifError as error:
            told = [error]
    (found,) = broadcast_object_list(told)
    if isinstance(found, AifError):
        raise found
    return found
