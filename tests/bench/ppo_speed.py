"""The speed of PPO: aif against trl 1.12.0's PPOTrainer (the last to have one).

    python tests/bench/ppo_speed.py --peer trl112/bin/python --reward runs/demo/reward

Both start from the same policy, reward model (and critic) and prompts, with the same batch, length,
temperature, penalties, rates and epochs, float32 weights and bfloat16 autocast where the hardware
has it. Every run is a process of its own; rounds are interleaved, the first step of a run is not
counted. trl is run as it comes (gradient checkpointing) and without. `peer_trl_ppo.py` says how to
install it. What the two learn is compared by `ppo_frontier.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="python of trl's environment")
    parser.add_argument("--reward", help="a reward model as `aif reward` leaves it")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=32, help="episodes a step")
    parser.add_argument("--tokens", type=int, default=48, help="of a response at most")
    parser.add_argument("--steps", type=int, default=2, help="in a run")
    parser.add_argument("--epochs", type=int, default=4, help="over a step's responses")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kl-coef", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=3e-6)
    parser.add_argument("--own", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.own:
        own(json.load(sys.stdin))
        return
    speed(made(args), args)


def made(args: argparse.Namespace) -> dict[str, Any]:
    """The job that both are given."""
    import torch

    from aif.data.readers import read_prompts
    from aif.models.load import bundled_folder, load_tokenizer, torch_dtype, usable_device
    from aif.train.tokens import Tokeniser

    folder = str(bundled_folder()) if args.model == "smollm2-135m" else args.model
    tokeniser = Tokeniser(load_tokenizer(folder)[0], 1024)
    prompts = list(read_prompts(str(ROOT / "prompts/everyday.jsonl")))
    ids = tokeniser.prompts([prompt.messages for prompt in prompts], args.tokens)
    return {
        "model": folder,
        "reward": args.reward,
        "prompts": [row.tolist() for row in ids],
        "file": str(ROOT / "prompts/everyday.jsonl"),
        "batch": args.batch,
        "micro_batch": 8,
        "steps": args.steps,
        "ppo_epochs": args.epochs,
        "response_tokens": args.tokens,
        "temperature": 0.7,
        "kl_coef": args.kl_coef,
        "missing_eos_penalty": 1.0,
        "learning_rate": args.learning_rate,
        "bf16": torch_dtype("auto", usable_device("auto")) == torch.bfloat16,
        "gradient_checkpointing": False,
        "seed": 0,
    }


def own(job: dict[str, Any]) -> None:
    """One run of aif: a line of JSON a step."""
    from aif.config.settings import Settings
    from aif.config.toml import checked
    from aif.run import Run
    from aif.train.ppo.setup import Inputs, build, check_settings

    same = ("response_tokens", "temperature", "kl_coef", "missing_eos_penalty", "learning_rate")
    table = {name: job[name] for name in same} | {
        "prompts": job["file"],
        "model": job["model"],
        "reward_model": job["reward"],
        "batch_size": job["batch"],
        "max_steps": job["steps"],
        "ppo_epochs": job["ppo_epochs"],
        "seed": job["seed"],
        "normalise": False,
        "eval_fraction": 0.0,
    }
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(Path(scratch) / "run", checked(Settings, {"ppo": table}, "bench"))
        run.path.mkdir()
        algorithm = build(Inputs(run, check_settings(run), {}), run.path)
        policy = algorithm.accelerator.unwrap_model(algorithm.learner.model).policy
        for step in range(1, job["steps"] + 1):
            began = time.perf_counter()
            metrics = algorithm.step()
            print(json.dumps({"seconds": time.perf_counter() - began, **metrics}), flush=True)
            if step in job.get("keep_at", ()):
                policy.save_pretrained(Path(job["keep"]) / str(step))


def run(name: str, job: dict[str, Any], args: argparse.Namespace) -> list[dict[str, float]]:
    """What a contender's steps were like."""
    if name == "aif":
        command = [sys.executable, str(HERE / "ppo_speed.py"), "--own"]
    else:
        command = [args.peer, str(HERE / "peer_trl_ppo.py")]
        job = job | {"gradient_checkpointing": name == "trl default"}
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not rows:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    return [row for row in rows if "objective/kl" in row]


def speed(job: dict[str, Any], args: argparse.Namespace) -> None:
    names = ("aif", "trl tuned", "trl default") if args.peer else ("aif",)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names:
            rows = run(name, job | {"seed": number}, args)[1:]
            each = statistics.median(row["seconds"] for row in rows) / args.batch
            seconds[name].append(each)
            phases = {
                k[5:-2]: v for k, v in rows[-1].items() if k.startswith("time/") and "tok" not in k
            }
            told = ", ".join(f"{k} {v:.1f} s" for k, v in phases.items())
            print(f"round {number}: {name} {each:.3f} s an episode {told}", flush=True)
    for name, found in seconds.items():
        gain = statistics.median(s / a for s, a in zip(found, seconds["aif"], strict=True))
        spread = f"{min(found):.3f} to {max(found):.3f}"
        print(
            f"{name:12} {statistics.median(found):.3f} s an episode ({spread}), aif is x{gain:.2f}"
        )


if __name__ == "__main__":
    main()
