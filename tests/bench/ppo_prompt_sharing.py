"""What running a prompt once for all its samples saves PPO, reading and learning as the demo does.

    python tests/bench/ppo_prompt_sharing.py [--rounds 9] [--prompt 45] [--samples 4] [--tokens 32]

RLOO with adapters of rank 16 on random tokens, one pass over a step's responses, without sampling
and scoring. One model does both in turn, so that a busy machine slows both; medians, and the median
of each round's ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator

from aif.config.settings import PPOSettings
from aif.models.decode import SampledTokens
from aif.models.load import torch_dtype, usable_device
from aif.train.batch import Layout
from aif.train.model import inner, load_for_training, micro_batch, without_dropout
from aif.train.ppo.actor_critic import ActorCritic, Reference
from aif.train.ppo.experience import (
    Experience,
    compute_advantages,
    compute_logprobs,
    compute_rewards,
    response_mask,
    tokens_of,
)
from aif.train.ppo.update import Learner
from aif.train.prefix_groups import SharingLayout
from aif.train.tokens import TokenRow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=45, help="tokens of one")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="of a response")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    settings = PPOSettings(
        algorithm="rloo", samples=args.samples, ppo_epochs=1, lora={"rank": 16}, device=args.device
    )
    learner = learner_of(args.model, settings)
    most, call = micro_batch(learner.model.policy, settings)
    attention = 6 * inner(learner.model.policy).config.hidden_size
    layouts = {
        "plain": Layout(most, False, 0, call),
        "shared": SharingLayout(most, False, 0, call, attention_tokens=attention),
    }
    rows = responses(args)
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in layouts}
    for number in range(args.rounds + 1):
        for way, layout in layouts.items():
            took = step(replace(learner, layout=layout), rows, args.samples)
            if number:  # the first of each is to warm up
                seconds[way].append(took)
    for n, name in enumerate(("read", "learn", "both")):
        plain, shared = (
            [sum(took) if name == "both" else took[n] for took in seconds[way]] for way in layouts
        )
        ratio = statistics.median(p / s for p, s in zip(plain, shared, strict=True))
        print(
            f"{name:6} {statistics.median(plain):.3f} s with each response, "
            f"{statistics.median(shared):.3f} s once: x{ratio:.2f}"
        )


def learner_of(name: str, settings: PPOSettings) -> Learner:
    """A policy with adapters, as the stage has it."""
    place = usable_device(settings.device)
    mixed = "bf16" if torch_dtype(settings.dtype, place) == torch.bfloat16 else "no"
    accelerator = Accelerator(mixed_precision=mixed, cpu=place.type == "cpu")
    actor = ActorCritic(load_for_training(name, settings), None, temperature=0.7)
    without_dropout(actor)
    optimizer = torch.optim.AdamW([w for w in actor.parameters() if w.requires_grad], lr=1e-4)
    actor, optimizer = accelerator.prepare(actor, optimizer)
    return Learner(accelerator, actor, optimizer, Layout(1, False, 0), settings)


def responses(args: argparse.Namespace) -> list[TokenRow]:
    """Prompts of a length within a quarter of `args.prompt`, each with its samples."""
    draw = np.random.default_rng(0)
    found = []
    for _ in range(args.prompts):
        length = draw.integers(args.prompt * 3 // 4, args.prompt * 5 // 4 + 1)
        prompt = draw.integers(1000, 20_000, length)
        for _ in range(args.samples):
            ids = draw.integers(1000, 20_000, args.tokens)
            found.append(tokens_of(prompt, SampledTokens(tuple(ids.tolist()), False)))
    return found


def step(learner: Learner, rows: list[TokenRow], samples: int) -> tuple[float, float]:
    """Seconds to read a step's responses, and to learn from them."""
    device = learner.accelerator.device
    began = clock(device)
    reference = Reference(learner.model)
    outputs = compute_logprobs(rows, learner.model, reference, learner.layout, device)
    was_read = clock(device)
    prompts = [str(n // samples) for n in range(len(rows))]
    scores_B = torch.linspace(-1, 1, len(rows), device=device)
    mask_BT = response_mask(rows).to(device)
    rewards_BT = compute_rewards(scores_B, outputs, mask_BT, 0.1, learner.settings)
    advantages_BT, returns_BT = compute_advantages(
        rewards_BT, outputs.values_BT, mask_BT, prompts, learner.settings
    )
    experience = Experience(
        **vars(outputs), rows=rows, prompt_ids=prompts, response_mask_BT=mask_BT,
        rewards_BT=rewards_BT, advantages_BT=advantages_BT, returns_BT=returns_BT,
    )  # fmt: skip
    learner.update(experience, 0)
    return was_read - began, clock(device) - was_read


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
