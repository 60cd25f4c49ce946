"""The whole demo, seed by seed: what it takes, and whether the judge prefers what came of it.

    python tests/bench/demo.py [--seeds 0 1 2] [--out DIR]

Each seed is a process of its own that runs `runs/demo/run.toml` with every seed set to it. Told are
the seconds and the peak of resident memory of each stage, the win rate of PPO over SFT on prompts
that neither has seen, and the change of the gold within prompts, both with 95 % intervals.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from aif.stats.intervals import Bootstrap

ROOT = Path(__file__).resolve().parents[2]
SEEDED = ("respond", "revise", "sft", "label", "reward", "ppo", "evaluate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="keep the runs here; a second call resumes")
    parser.add_argument("--set", action="append", default=[], help="as of `aif run`")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="demo-"))
    for seed in options.seeds:
        folder = out / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "runs/demo/run.toml", folder / "run.toml")
        sets = [f"--set={table}.seed={seed}" for table in SEEDED]
        sets += [f"--set={given}" for given in options.set]
        began = time.monotonic()
        command = [sys.executable, "-m", "aif", "run", str(folder), "--quiet", *sets]
        process = subprocess.Popen(command, cwd=ROOT)
        peaks: dict[int, float] = {}
        threading.Thread(target=watch, args=(process.pid, folder, peaks), daemon=True).start()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"seed {seed}: aif run ended with {os.waitstatus_to_exitcode(status)}")
        tell(folder, seed, time.monotonic() - began, usage.ru_maxrss / 1e6, peaks)


def watch(pid: int, folder: Path, peaks: dict[int, float]) -> None:
    """Keeps the peak of resident memory, in GB, by the number of stages that were done."""
    with contextlib.suppress(psutil.Error):  # it has ended
        while True:
            held = psutil.Process(pid).memory_info().rss / 1e9
            number = len(stages_of(folder))
            peaks[number] = max(held, peaks.get(number, 0.0))
            time.sleep(0.2)


def stages_of(folder: Path) -> dict[str, dict]:
    """The stages that were done, in their order."""
    path = folder / "pipeline.json"
    return json.loads(path.read_text()) if path.exists() else {}


def tell(
    folder: Path, seed: int, seconds: float, gigabytes: float, peaks: dict[int, float]
) -> None:
    """What a finished run has in its files."""
    told = ", ".join(
        f"{name} {stage['seconds']:.0f} s {peaks.get(number, 0.0):.1f} GB"
        for number, (name, stage) in enumerate(stages_of(folder).items())
    )
    print(f"seed {seed}: {seconds:.0f} s, peak {gigabytes:.1f} GB ({told})", flush=True)
    found = json.loads((folder / "evaluate.json").read_text())
    for match in found["matches"]:
        rate = match["win_rate"]
        told = f"{rate['mean']:.3f} ({rate['low']:.3f} to {rate['high']:.3f})"
        print(f"  {match['first']} against {match['second']}: {told} of {match['n']}")
    card = json.loads((folder / "reward-card.json").read_text())["ai"]
    told = f"{card['accuracy']:.3f} of {card['n']}"
    confident = card["confident"]
    print(f"  reward model: {told}, confident {confident['accuracy']:.3f} of {confident['n']}")
    rows = [json.loads(line) for line in (folder / "evaluation.jsonl").open()]
    vader = SentimentIntensityAnalyzer()
    for row in rows:
        row["vader"] = row["response"] and vader.polarity_scores(row["response"])["compound"]
    for name in ("gold", "score", "vader"):
        moved = change(rows, name)
        interval = f"({moved['low']:+.3f} to {moved['high']:+.3f})"
        print(f"  {name} of ppo less that of sft: {moved['mean']:+.3f} {interval}")
    for policy in found["policies"]:
        kl = policy["kl"] and round(policy["kl"]["mean"], 2)
        print(f"  {policy['name']}: KL {kl}, distinct-2 {policy['distinct_2']:.2f}", flush=True)


def change(rows: list[dict], name: str) -> dict[str, float]:
    """The difference within prompts: its mean, with `low` and `high`."""
    told = {(row["policy"], row["prompt_id"]): row[name] for row in rows}
    prompts = sorted({row["prompt_id"] for row in rows})
    both = [(told["ppo", prompt], told["sft", prompt]) for prompt in prompts]
    apart = [a - b for a, b in both if a is not None and b is not None]
    return Bootstrap(0, 10_000).mean(apart)


if __name__ == "__main__":
    main()
