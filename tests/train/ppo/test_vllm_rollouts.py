"""Rollouts by a real vLLM. It has an environment of its own: `make test-vllm`."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import json
import os

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

import numpy as np
import torch

from aif.models.load import bundled_folder, ends_of, load_model, load_tokenizer
from aif.train.ppo.actor_critic import merged_weights
from aif.train.ppo.vllm_rollouts import VLLMRollouts
from tests.conftest import ROOT, aif

TEMPERATURE = 0.7
QUESTIONS = ["Name a fruit.", "How are you today?", "Tell me a story about a very old house."]


@pytest.fixture(scope="module")
def policy():
    return load_model("smollm2-135m", "bfloat16", "cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("smollm2-135m")[0]


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[np.ndarray]:
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        for text in QUESTIONS
    ]
    return [np.array(tokenizer(text)["input_ids"], np.int32) for text in texts * 8]


@pytest.fixture(scope="module")
def engine(policy, tokenizer) -> VLLMRollouts:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return VLLMRollouts(
        str(bundled_folder()), dtype="bfloat16", max_tokens=24, temperature=TEMPERATURE,
        ends=ends_of(policy, tokenizer), context=512, memory=0.3,
    )  # fmt: skip


def mean_logprob(model, prompts, responses) -> float:
    """Of the drawn tokens under the model, at the temperature of the draw."""
    means = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor(np.concatenate([prompt, response.ids])[None].astype(int))
        with torch.no_grad():
            logits_TV = model(ids).logits[0, len(prompt) - 1 : -1].float() / TEMPERATURE
        logprobs_TV = logits_TV.log_softmax(-1)
        means.append(logprobs_TV.gather(1, ids[0, len(prompt) :, None]).mean())
    return float(torch.stack(means).mean())


def test_responses_are_the_policys_and_end_with_their_first_end(engine, policy, prompts, tokenizer):
    engine.sync(merged_weights(policy))
    responses = engine.sample(prompts, range(len(prompts)))
    ends = ends_of(policy, tokenizer)
    for response in responses:
        assert response.ended == (response.ids[-1] in ends)
        assert not ends & set(response.ids[:-1])
        assert len(response.ids) == 24 or response.ended
    entropy_like = -mean_logprob(policy, prompts, responses)
    assert 0.2 < entropy_like < 2.0  # as a model's own samples are, and no other's


def test_a_seed_is_a_response(engine, prompts):
    first, again = (engine.sample(prompts, range(len(prompts))) for _ in range(2))
    other = engine.sample(prompts, range(100, 100 + len(prompts)))
    same = [a.ids == b.ids for a, b in zip(first, again, strict=True)]
    assert sum(same) >= 0.9 * len(same)  # bfloat16: a batch's shape may flip a near tie
    assert sum(a.ids == b.ids for a, b in zip(first, other, strict=True)) < 0.3 * len(prompts)


def test_it_samples_from_the_weights_that_it_was_given_last(engine, policy, prompts):
    """Another policy's samples are likely under that one, and unlikely under the old one."""
    changed = load_model("smollm2-135m", "bfloat16", "cpu")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in changed.model.layers[-1].parameters():
            weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=draw)
    engine.sync(merged_weights(changed))
    responses = engine.sample(prompts, range(len(prompts)))
    theirs, ours = (
        mean_logprob(changed, prompts, responses),
        mean_logprob(policy, prompts, responses),
    )
    assert theirs > ours + 0.1
    engine.sync(merged_weights(policy))
    back = engine.sample(prompts, range(len(prompts)))
    assert mean_logprob(policy, prompts, back) > mean_logprob(changed, prompts, back) + 0.1


def test_ppo_steps_with_it(tmp_path):
    """From the command line, in a process of its own, which ends in peace."""
    (tmp_path / "rewards.py").write_text(
        "def brief(prompts, texts):\n    return [-len(text) / 100 for text in texts]\n"
    )
    (tmp_path / "run").mkdir()
    options = {"rollouts": "vllm", "batch_size": 4, "max_steps": 2, "ppo_epochs": 1}
    options |= {"response_tokens": 16, "max_tokens": 512, "eval_fraction": 0.0}
    options |= {"algorithm": "reinforce", "learning_rate": 1e-4}
    done = aif(
        "ppo", tmp_path / "run", "--prompts", ROOT / "prompts/everyday.jsonl", "--json",
        "--reward", f"{tmp_path}/rewards.py:brief",
        *(part for key, value in options.items() for part in ("--set", f"ppo.{key}={value}")),
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["steps"] == 2
    # The log-probabilities are the learner's own, so the first ratio is 1 whatever vLLM computed.
    assert summary["first"]["val/ratio"] == pytest.approx(1.0, abs=1e-3)
    assert summary["first"]["objective/kl"] == 0.0
    assert summary["last"]["objective/kl"] != 0.0
