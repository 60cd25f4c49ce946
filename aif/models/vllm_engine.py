"""Starting a vLLM engine in this process: for a judge, a policy or PPO's rollouts."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch

from aif.config.settings import BUNDLED
from aif.dependencies import require
from aif.errors import AifError
from aif.models.load import bundled_folder

GPU_SHARE, CPU_SHARE = 0.9, 0.3  # of the device's memory, by default
AUTO = -1  # vLLM's value for the longest context that fits into memory


def start(
    needed_by: str, name: str, *, dtype: str, context: int = AUTO, memory: float | None, **more: Any
) -> Any:
    """A `vllm.LLM` on model `name`: a folder, a hub id or the bundled model.

    `context` is in tokens; `memory` is the share of the device's memory for weights and cache;
    `more` are vLLM's engine arguments. Raises AifError, one line that begins with `needed_by`, if
    vLLM is not installed or does not start.

    The engine's core runs in this process: it ends when we are killed and takes weights as tensors.
    """
    require(needed_by, "vllm", extra="vllm")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # results go to stdout
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from the modules that vLLM imports
            from vllm import LLM

            return LLM(
                str(bundled_folder()) if name == BUNDLED else name,
                dtype=dtype,
                max_model_len=context,
                gpu_memory_utilization=memory or default_share(),
                enable_prefix_caching=True,
                load_format="safetensors",  # never a pickle
                trust_remote_code=False,
                use_tqdm_on_load=False,
                **more,
            )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise AifError(f"{needed_by}: vLLM does not start: {reason}") from error


def default_share() -> float:
    """The share of the device's memory for an engine that has the device to itself."""
    return GPU_SHARE if torch.cuda.is_available() else CPU_SHARE


def shut_down(engine: Any) -> None:
    """Stop the engine and free its memory; it cannot be used again."""
    engine.llm_engine.engine_core.shutdown()
