"""How fast this machine runs a model: tokens per second to read, to write and to learn from.

It times a model with random weights. A large model is cut to its first layers, so that this takes
only seconds, and its rates are scaled by the number of weights. The rates are for planning: right
within a factor of about two.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from aif.models.decode import decode
from aif.models.load import load_config, quiet, torch_dtype, usable_device

MOST_WEIGHTS = 300e6  # of the model that is timed
LENGTH = 128  # tokens of a text
ROWS, STEPS = 16, 4  # texts that are sampled together, and tokens of each
SECONDS = 0.7  # a measurement is repeated for this time


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second of one model on this machine."""

    read: float  # a forward pass
    written: float  # sampled, ROWS texts together
    learned: float  # a forward and a backward pass through all weights


def measure(name: str, dtype: str = "auto", device: str = "auto") -> Speed:
    """Time the model `name` for a few seconds. Raises InputError if there is no such model."""
    quiet()
    config = load_config(name)
    place = usable_device(device)
    kind = torch_dtype(dtype, place)
    small = _cut(config)
    model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).to(place)
    ids_BT = torch.randint(0, small.get_text_config().vocab_size, (1, LENGTH), device=place)
    learned = _rate(lambda: _learn(model, ids_BT, kind), LENGTH, place)
    model = model.to(kind).eval()
    read = _rate(lambda: _read(model, ids_BT), LENGTH, place)
    written = _rate(lambda: _write(model), ROWS * STEPS, place)
    scale = _weights(small) / _weights(config)
    return Speed(read * scale, written * scale, learned * scale)


def _weights(config: Any) -> int:
    """The number of weights of a model of this shape; the model is not built."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def _cut(config: Any) -> Any:
    """The config with as many layers as fit in MOST_WEIGHTS, at least one."""
    text = config.get_text_config()
    layers, weights = text.num_hidden_layers, _weights(config)
    if weights <= MOST_WEIGHTS:
        return config
    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers = max(1, int(layers * MOST_WEIGHTS / weights))
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    return small


def _rate(work: Callable[[], object], tokens: int, place: torch.device) -> float:
    """Tokens a second of the fastest of some runs: other work on the machine only slows a run."""
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < SECONDS:
        began = time.perf_counter()
        work()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        seconds.append(time.perf_counter() - began)
    return tokens / min(seconds)


def _learn(model: Any, ids_BT: torch.Tensor, kind: torch.dtype) -> None:
    with torch.autocast(model.device.type, dtype=kind, enabled=kind != torch.float32):
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
    loss.backward()
    model.zero_grad()


@torch.inference_mode()
def _read(model: Any, ids_BT: torch.Tensor) -> None:
    model(input_ids=ids_BT)


def _write(model: Any) -> None:
    rows = [[number, number] for number in range(ROWS)]
    decode(
        model, rows, seeds=range(ROWS), temperatures=[1.0] * ROWS, max_tokens=STEPS,
        ends=set(), pad=0,
    )  # fmt: skip
