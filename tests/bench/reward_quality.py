"""How well a reward model learns the bundled judge's labels of the bundled model's responses.

    python tests/bench/reward_quality.py [--prompts 110] [--samples 4] [--seeds 0 1 2]

The demo's prompts, constitution and judge; every pair of a prompt's responses is labelled. A seed
decides which prompts are held out, the order and the initial head. Accuracy is on held-out prompts
against the AI labels, over all pairs and where the label is outside of 0.3 to 0.7; beside it, that
of preferring the longer response.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import fmean

from aif.config.settings import load_settings
from aif.progress import Progress
from aif.run import Run
from aif.stages.compare import compare
from aif.stages.label import label
from aif.stages.respond import respond
from aif.train.reward.train import reward

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=110)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.7, help="of the policy")
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--head", choices=("random", "fitted"), default="random")
    parser.add_argument("--batch-size", type=int, default=4, help="prompts an optimizer step")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--held-out", type=float, default=0.18, help="share of the prompts")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--curve", type=float, nargs="*", default=[])
    parser.add_argument("--out", type=Path, help="keep the run here; a second call resumes")
    options = parser.parse_args()
    folder = (options.out or Path(tempfile.mkdtemp(prefix="reward-quality-"))) / "run"
    folder.mkdir(parents=True, exist_ok=True)
    with Progress() as progress:
        run = opened(folder, options, 0)
        for stage in (respond, compare, label):
            stage(run, progress)
        cards = []
        for seed in options.seeds:
            cards.append(reward(opened(folder, options, seed), progress)["card"])
            print_row(f"seed {seed}", cards[-1])
    every = [card["ai"] for card in cards]
    print(
        f"mean of {len(every)}: {fmean(c['accuracy'] for c in every):.3f}, "
        f"confident {fmean(c['confident']['accuracy'] for c in every):.3f}, "
        f"longer wins {fmean(c['longer_wins'] for c in every):.3f}, "
        f"calibration error {fmean(c['calibration']['ece'] for c in every):.3f}"
    )


def opened(folder: Path, options: argparse.Namespace, seed: int) -> Run:
    given = {
        "policy": {"max_tokens": options.tokens, "temperature": options.temperature},
        "respond": {"prompts": str(ROOT / "prompts/everyday.jsonl"), "samples": options.samples},
        "respond.limit": options.prompts,
        "label.constitution": str(ROOT / "constitutions/warm.toml"),
        "reward": {
            "epochs": options.epochs,
            "head": options.head,
            "batch_size": options.batch_size,
            "learning_rate": options.learning_rate,
            "eval_fraction": options.held_out,
            "seed": seed,
            "curve": options.curve if seed == options.seeds[0] else [],
        },
    }
    return Run(folder, load_settings(folder / "run.toml", given))


def print_row(name: str, card: dict) -> None:
    found = card["ai"]
    told = [f"{name}: {rate(found)}", f"confident {rate(found['confident'])}"]
    told += [f"longer wins {found['longer_wins']:.3f}, ECE {found['calibration']['ece']:.3f}"]
    told += [f"{kind} {rate(one)}" for kind, one in card["by_principle"].items()]
    print("; ".join(told), flush=True)


def rate(found: dict) -> str:
    low, high = found["interval"]
    return f"{found['accuracy']:.3f} ({low:.3f} to {high:.3f}) of {found['n']}"


if __name__ == "__main__":
    main()
