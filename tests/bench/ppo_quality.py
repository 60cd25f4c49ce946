"""Whether PPO against the reward model pleases the judge too: the bundled model, seed by seed.

    python tests/bench/ppo_quality.py --reward runs/demo/reward [--steps 25] [--seeds 0 1 2]

Prompts that are held out are answered before and after with the same draws, and scored by the
reward model (proxy), by the bundled judge under `constitutions/warm.toml` (gold, the mean log-odds
of its principles, which nothing here is trained on) and by VADER (Hutto and Gilbert 2014).
Intervals are 95 % of a bootstrap over prompts of the difference.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from aif.cli.options import parse_source
from aif.config.settings import Settings
from aif.config.toml import checked
from aif.progress import Progress
from aif.run import Run
from aif.stages.ppo import ppo
from aif.stats.intervals import Bootstrap

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reward", required=True, help="a reward model as `aif reward` leaves it")
    parser.add_argument("--source", action="append", help="of the reward, as `aif ppo --reward`")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=32, help="of a response at most")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--kl-coef", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--eos-penalty", type=float, default=0.0, help="most are cut off here")
    parser.add_argument("--schedule", default="linear")
    parser.add_argument("--epochs", type=int, default=2, help="over a step's responses")
    parser.add_argument("--held-out", type=float, default=0.2)
    parser.add_argument("--looks", type=int, default=5)
    parser.add_argument("--algorithm", choices=("ppo", "rloo", "reinforce"), default="ppo")
    parser.add_argument("--samples", type=int, default=1, help="of a prompt; 24 a step in all")
    parser.add_argument("--critic-head", choices=("zero", "reward"), default="zero")
    parser.add_argument("--critic-learning-rate", type=float)
    parser.add_argument("--full", action="store_true", help="fine-tune all weights, not adapters")
    parser.add_argument("--out", type=Path, help="keep the runs here; a second call resumes")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="ppo-quality-"))
    for seed in options.seeds:
        began = time.monotonic()
        run = opened(out / f"seed{seed}", options, seed)
        with Progress() as progress:
            ppo(run, progress)
        tell(run, seed, time.monotonic() - began)


def opened(folder: Path, options: argparse.Namespace, seed: int) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    table = {
        "prompts": str(ROOT / "prompts/everyday.jsonl"),
        "reward_model": options.reward,
        "gold": "judge",
        "reward": dict(map(parse_source, options.source or ["model"])),
        "algorithm": options.algorithm,
        "samples": options.samples,
        "batch_size": 24 // options.samples,
        "critic_head": options.critic_head,
        "critic_learning_rate": options.critic_learning_rate,
        "max_steps": options.steps,
        "ppo_epochs": options.epochs,
        "schedule": options.schedule,
        "response_tokens": options.tokens,
        "temperature": options.temperature,
        "missing_eos_penalty": options.eos_penalty,
        "kl_coef": options.kl_coef,
        "learning_rate": options.learning_rate,
        "eval_fraction": options.held_out,
        "eval_every": max(1, options.steps // options.looks),
        "seed": seed,
    } | ({} if options.full else {"lora": {"rank": 16}})
    label = {"constitution": str(ROOT / "constitutions/warm.toml")}
    return Run(folder, checked(Settings, {"ppo": table, "label": label}, "bench"))


def tell(run: Run, seed: int, seconds: float) -> None:
    """A line a look, then what changed from the first to the last one."""
    rows = [json.loads(line) for line in (run.path / "ppo-samples.jsonl").open()]
    vader = SentimentIntensityAnalyzer()
    for row in rows:
        row["vader"] = vader.polarity_scores(row["response"])["compound"]
    steps = sorted({row["step"] for row in rows})
    print(f"seed {seed}: {seconds:.0f} s, {len(rows) // len(steps)} held-out prompts")
    for step in steps:
        here = [row for row in rows if row["step"] == step]
        told = ", ".join(f"{name} {mean(here, name):.3f}" for name in ("score", "gold", "vader"))
        told += f", {mean(here, 'tokens'):.0f} tokens"
        print(f"  step {step:3}: KL {mean(here, 'kl'):6.2f}, {told}")
    for name in ("score", "gold", "vader"):
        found = change(rows, steps[0], steps[-1], name)
        interval = f"({found['low']:+.3f} to {found['high']:+.3f})"
        print(f"  {name:6} {found['mean']:+.3f} {interval}", flush=True)


def mean(rows: list[dict[str, Any]], name: str) -> float:
    return fmean(row[name] for row in rows if row[name] is not None)


def change(rows: list[dict[str, Any]], first: int, last: int, name: str) -> dict[str, float]:
    """The difference within prompts from one step to another: its mean, with `low` and `high`."""
    told = {(row["step"], row["prompt_id"]): row[name] for row in rows}
    prompts = sorted({row["prompt_id"] for row in rows})
    both = [(told[first, prompt], told[last, prompt]) for prompt in prompts]
    return Bootstrap(0, 10_000).mean([b - a for a, b in both if a is not None and b is not None])


if __name__ == "__main__":
    main()
