"""Rollouts by vLLM, in this process: its scheduler and its kernels, our weights at every step.

What vLLM computes is close to what the policy computes and not the same, so its log-probabilities
are never used: those that PPO's ratio is taken of are read again by the model that learns (detail
17).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from aif.models import vllm_engine
from aif.train.ppo.rollouts import Rollout


class VLLMRollouts:
    """A vLLM engine that takes over the policy's weights; `name` is a folder or a hub id.

    `memory` is the share of a GPU's memory that it may hold, weights and cache. Raises AifError
    where vLLM is not installed or does not start.
    """

    models: Sequence[Any] = ()  # its memory is what it was given

    def __init__(
        self,
        name: str,
        *,
        dtype: str,
        max_tokens: int,
        temperature: float,
        ends: set[int],
        context: int,
        memory: float,
    ):
        self._llm = vllm_engine.start(
            "ppo.rollouts", name, dtype=dtype, context=context, memory=memory
        )
        from vllm import SamplingParams

        self._ends = sorted(ends)
        self._params = functools.partial(
            SamplingParams,
            temperature=temperature,
            max_tokens=max_tokens,
            stop_token_ids=self._ends,
            detokenize=False,
        )

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take over the policy's weights; what was cached under the old ones is dropped."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(weights)})
        self._llm.reset_prefix_cache()

    def sample(self, prompts: Sequence[np.ndarray], seeds: Sequence[int]) -> list[Rollout]:
        """A response to each prompt, in their order."""
        asked = [{"prompt_token_ids": ids.tolist()} for ids in prompts]
        made = self._llm.generate(
            asked, [self._params(seed=seed) for seed in seeds], use_tqdm=False
        )
        return [self._rollout(found.outputs[0]) for found in made]

    def close(self) -> None:
        """End the engine and free its memory; it is of no use afterwards."""
        vllm_engine.shut_down(self._llm)

    def _rollout(self, output: Any) -> Rollout:
        ids = list(output.token_ids)
        ended = output.finish_reason == "stop"
        if ended and ids[-1:] not in [[end] for end in self._ends]:
            ids.append(output.stop_reason)  # the token that ended it, where vLLM left it out
        return Rollout(np.array(ids, np.int32), ended)
