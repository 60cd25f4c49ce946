"""Sampling responses with vLLM in this process, with the policy's weights at every step.

vLLM's log-probabilities are close to the policy's but not equal, so PPO does not use them. The
model that learns computes the log-probabilities of PPO's ratio again (detail 17).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from aif.models import vllm_engine
from aif.models.decode import SampledTokens


class VLLMRollouts:
    """A vLLM engine that takes the policy's weights; `name` is a folder or a hub id.

    `memory` is the share of the GPU's memory for weights and cache. Raises AifError if vLLM is not
    installed or does not start.
    """

    models: Sequence[Any] = ()  # vLLM's memory is fixed by `memory`

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

        self._params = functools.partial(
            SamplingParams,
            temperature=temperature,
            max_tokens=max_tokens,
            stop_token_ids=sorted(ends),
            detokenize=False,
        )
        self._ends = ends

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take the policy's weights and drop the cache of the old ones."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(weights)})
        self._llm.reset_prefix_cache()

    def sample(self, prompts: Sequence[np.ndarray], seeds: Sequence[int]) -> list[SampledTokens]:
        """A response to each prompt, in their order."""
        outputs = self._llm.generate(
            [{"prompt_token_ids": ids_T.tolist()} for ids_T in prompts],
            [self._params(seed=seed) for seed in seeds],
            use_tqdm=False,
        )
        return [self._response(output.outputs[0]) for output in outputs]

    def close(self) -> None:
        """Stop the engine and free its memory; it cannot be used again."""
        vllm_engine.shut_down(self._llm)

    def _response(self, completion: Any) -> SampledTokens:
        ids, ended = tuple(completion.token_ids), completion.finish_reason == "stop"
        if ended and (not ids or ids[-1] not in self._ends):
            ids += (completion.stop_reason,)  # vLLM leaves some stop tokens out
        return SampledTokens(ids, ended)
