"""What the benchmarks of training share: a clock, interleaved rounds, and the table they make."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable

import torch
from datasets import disable_progress_bars
from transformers import TrainerCallback

Contenders = dict[str, Callable[[str], float]]  # name -> run in a scratch folder, gives seconds


class Clock(TrainerCallback):
    """From the first step's start to the last one's end."""

    def on_step_begin(self, args, state, control, **_):
        if not hasattr(self, "began"):
            self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.began


def quiet() -> None:
    """Only the table is printed."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bars()


def compare(runs: Contenders, rounds: int, work: float, unit: str) -> None:
    """Run each once a round, in turn, and print rates of `work` units and ratios to the first.

    The ratios are medians of ratios within a round, so that a slow minute of a shared machine
    weighs on all alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds):
            for name, run in runs.items():
                seconds[name].append(run(f"{scratch}/run{number}"))
    own = next(iter(runs))
    print(f"{'':16}{unit:>10}{'min':>9}{'max':>9}{f'{own} is x':>10}")
    for name, took in seconds.items():
        rates = sorted(work / s for s in took)
        gain = statistics.median(s / ours for s, ours in zip(took, seconds[own], strict=True))
        median = statistics.median(rates)
        print(f"{name:16}{median:10.2f}{rates[0]:9.2f}{rates[-1]:9.2f}{gain:10.2f}", flush=True)
