"""What running a prompt once saves, by its length: time and memory of a training step.

    python tests/bench/prompt_sharing.py [--model smollm2-135m] [--responses 2] [--rounds 3]

Pairs of 32-token responses to prompts of 32 to 1,024 random tokens, eight pairs, forward and
backward of the Bradley-Terry loss, in one micro-batch. Each way runs in a process of its own, whose
peak resident memory over what it held before the step is shown (on a GPU, peak allocated memory).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from types import MethodType

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--responses", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32, help="of a response")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="*", default=[32, 128, 512, 1024])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        length, share = args.one.split(",")
        print(json.dumps(measured(args, int(length), share == "shared")))
        return
    print(
        f"{'prompt':>7}{'plain s':>10}{'shared s':>10}{'ratio':>7}{'plain MB':>10}{'shared MB':>10}"
    )
    for length in args.lengths:
        rows = {"plain": [], "shared": []}
        for _ in range(args.rounds):
            for way in rows:
                command = [*sys.orig_argv[:1], *sys.argv, "--one", f"{length},{way}"]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rows[way].append(json.loads(done.stdout))
        plain, shared = (
            [statistics.median(row[key] for row in rows[way]) for key in ("seconds", "mb")]
            for way in ("plain", "shared")
        )
        ratio = statistics.median(
            p["seconds"] / s["seconds"] for p, s in zip(rows["plain"], rows["shared"], strict=True)
        )
        print(
            f"{length:7}{plain[0]:10.2f}{shared[0]:10.2f}{ratio:10.2f}{plain[1]:10.0f}{shared[1]:10.0f}",
            flush=True,
        )


def measured(args: argparse.Namespace, length: int, share: bool) -> dict[str, float]:
    """Seconds and megabytes of the second of two steps."""
    import torch

    from aif.config.settings import RewardSettings
    from aif.models.load import load_reward_model, torch_dtype
    from aif.train.prefix_groups import PrefixLayout, SharedPrefix
    from aif.train.reward.losses import Pairs
    from aif.train.reward.model import score_loss

    model = load_reward_model(args.model, "float32", args.device, new_head=0).train()
    objective = Pairs(RewardSettings())
    model.forward = MethodType(score_loss(objective), model)
    draw = np.random.default_rng(0)
    made = [
        SharedPrefix(
            "x",
            draw.integers(1000, 20_000, length).astype(np.int32),
            [
                draw.integers(1000, 20_000, args.tokens).astype(np.int32)
                for _ in range(args.responses)
            ],
            first=[0],
            second=[1],
            p_first=[1.0],
        )
        for _ in range(args.pairs)
    ]
    (batch,) = PrefixLayout(10**9, 0, share, objective, 10**9).step(made).batches
    place, kind = model.device, torch_dtype("auto", model.device)
    for _ in range(2):
        before = memory(place)
        began = time.perf_counter()
        with torch.autocast(place.type, kind, enabled=kind != torch.float32):
            loss = model(**batch.inputs(place))
        loss.backward()
        if place.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "mb": memory(place, peak=True) - before}


def memory(place, peak: bool = False) -> float:
    """Megabytes in use, or the most that was."""
    import torch

    if place.type == "cuda":
        found = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        return found / 2**20
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


if __name__ == "__main__":
    main()
