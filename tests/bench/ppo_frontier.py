"""What PPO learns for how much drift: aif against trl 1.12.0's PPOTrainer, seed by seed.

    python tests/bench/ppo_frontier.py --peer trl112/bin/python --reward runs/demo/reward

Both learn from the same reward model at the same settings (`ppo_speed.py`), and their policies, as
they were halfway and at the end, answer the same held-out prompts with the same draws. One reader
scores the answers and takes the KL from the policy before, so the two stand on one pair of axes.
trl's copy of the reward model reads a response's EOS, as aif's does, and no missing EOS is fined.

The frontiers are compared at the smaller of the two last KLs, between a frontier's points by a
line over the root of KL (in which rewards are near to straight: Gao et al. 2023, 2210.10760).
Intervals are 95 % of a bootstrap over prompts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ppo_speed import ROOT, made, run

from aif.config.settings import RewardSettings, Settings
from aif.config.toml import checked
from aif.data.readers import read_prompts
from aif.models.load import load_model, load_tokenizer
from aif.stats.intervals import Bootstrap
from aif.train.ppo.experience import tokens_of
from aif.train.ppo.kl import response_logprobs
from aif.train.ppo.loop import seed_of, texts_of
from aif.train.ppo.rollouts import TransformersRollouts
from aif.train.reward.model import RewardModel
from aif.train.tokens import Tokeniser

NAMES = ("aif", "trl tuned")
BOOTSTRAP = Bootstrap(0, 10_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True, help="python of trl's environment")
    parser.add_argument("--reward", required=True, help="a reward model as `aif reward` leaves it")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=16, help="episodes a step")
    parser.add_argument("--tokens", type=int, default=24, help="of a response at most")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=2, help="over a step's responses")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kl-coef", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=8e-5)
    args = parser.parse_args()
    job = made(args) | {"missing_eos_penalty": 0.0, "keep_at": [args.steps // 2, args.steps]}
    reader = Reader(job)
    print(f"before: score {reader.before_P.mean():+.3f}", flush=True)
    for seed in range(args.seeds):
        found = {name: learned(name, job | {"seed": seed}, args, reader) for name in NAMES}
        at = min(points[-1][0] for points in found.values())
        ours_P, theirs_P = (gain_at(found[name], at) for name in NAMES)
        told = f"aif {ours_P.mean():+.3f}, trl {theirs_P.mean():+.3f}, {shown(ours_P - theirs_P)}"
        print(f"seed {seed}, gain in score at KL {at:.1f}: {told}", flush=True)


Point = tuple[float, np.ndarray]  # KL, and the gain in score of each prompt


class Reader:
    """Draws a policy's answers to the held-out prompts and reads them."""

    def __init__(self, job: dict[str, Any]):
        self.job, self.base = job, job["model"]
        self.settings = checked(Settings, {"policy": {"temperature": job["temperature"]}}, "bench")
        self.scorer = RewardModel.load(Path(job["reward"]), RewardSettings())
        self.tokenizer = load_tokenizer(self.base)[0]
        held = list(read_prompts(str(ROOT / "prompts/everyday-held-out.jsonl")))
        ids = Tokeniser(self.tokenizer, 1024).prompts([p.messages for p in held], 64)
        fit = [(p, i) for p, i in zip(held, ids, strict=True) if i is not None]
        self.prompts, self.ids = zip(*fit, strict=True)
        self.before_P = self.read(self.base)[1]

    def read(self, folder: str) -> tuple[float, np.ndarray]:
        """The mean KL from the policy before, and the score of each prompt's answer, [P]."""
        model = load_model(folder, "auto", "auto")
        sampler = TransformersRollouts(
            model,
            max_tokens=self.job["response_tokens"],
            temperature=self.job["temperature"],
            ends={self.tokenizer.eos_token_id},
            pad_id=self.tokenizer.pad_token_id,
        )
        drawn = sampler.sample(self.ids, [seed_of("frontier", p.id) for p in self.prompts])
        rows = [tokens_of(*pair) for pair in zip(self.ids, drawn, strict=True)]
        texts = texts_of(drawn, self.tokenizer)
        asked = [(p.messages, [t]) for p, t in zip(self.prompts, texts, strict=True)]
        score_P = np.array([row[0] for row in self.scorer.scores(asked)])
        if folder == self.base:
            return 0.0, score_P
        own_P, before_P = (response_logprobs(m, rows, self.settings) for m in (folder, self.base))
        return float(np.mean(np.subtract(own_P, before_P))), score_P


def learned(name: str, job: dict[str, Any], args: Any, reader: Reader) -> list[Point]:
    """A contender's frontier: the policy before, halfway and at the end."""
    points, began = [(0.0, np.zeros_like(reader.before_P))], time.perf_counter()
    with tempfile.TemporaryDirectory() as keep:
        run(name, job | {"keep": keep}, args)
        took = time.perf_counter() - began
        for step in job["keep_at"]:
            kl, score_P = reader.read(f"{keep}/{step}")
            points.append((kl, score_P - reader.before_P))
    told = "; ".join(f"KL {kl:.1f}, {shown(gain_P)}" for kl, gain_P in points[1:])
    print(f"seed {job['seed']} {name} ({took:.0f} s): {told}", flush=True)
    return points


def gain_at(points: list[Point], kl: float) -> np.ndarray:
    """The gain of each prompt [P] where a frontier reaches that KL."""
    roots = [max(0.0, point[0]) ** 0.5 for point in points]
    order = np.argsort(roots)
    gains_PK = np.stack([points[k][1] for k in order], 1)
    known = [roots[k] for k in order]
    return np.array([np.interp(max(0.0, kl) ** 0.5, known, gain_K) for gain_K in gains_PK])


def shown(gain_P: np.ndarray) -> str:
    found = BOOTSTRAP.mean(list(gain_P))
    return f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
