"""How well the bundled judge tells a positive movie review from a negative one.

    python tests/bench/judge_quality.py --data ../shared/data/sentiment/rt_polarity.jsonl

Pairs of one positive and one negative sentence (Pang & Lee 2005) are labelled by `aif label` with
`constitutions/positivity.toml`, by three ways of asking; the table has the share of pairs in which
the positive one wins, with a 95 % Wilson interval, and the seconds it took.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import tomli_w
from scipy.stats import binomtest

ROOT = Path(__file__).parents[2]
CONSTITUTION = ROOT / "constitutions" / "positivity.toml"
PROMPT = "Review a movie you have seen, in one sentence."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge", default="smollm2-135m")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_pairs(arguments.data, arguments.pairs, arguments.seed, work / "pairs.jsonl")
        zero_shot = without_examples(CONSTITUTION, work / "zero-shot.toml")
        print(f"{'how':36} {'accuracy':>8}  {'95 % interval':15} {'seconds':>7}")
        for name, constitution, flags in (
            ("pointwise, text, few-shot", CONSTITUTION, ["--protocol", "pointwise"]),
            ("pointwise, text, zero-shot", zero_shot, ["--protocol", "pointwise"]),
            ("pointwise, chat, few-shot", CONSTITUTION, ["--set", "judge.form=chat"]),
            ("pointwise, chat, zero-shot", zero_shot, ["--set", "judge.form=chat"]),
            ("pairwise, text", CONSTITUTION, ["--protocol", "pairwise"]),
            (
                "pairwise, chat",
                CONSTITUTION,
                ["--protocol", "pairwise", "--set", "judge.form=chat"],
            ),
        ):
            began = time.perf_counter()
            run = work / name.replace(",", "").replace(" ", "-")
            label(work / "pairs.jsonl", constitution, arguments.judge, run, flags)
            seconds = time.perf_counter() - began
            right, total, agreement = score(run)
            interval = binomtest(right, total).proportion_ci(method="wilson")
            told = f"   same winner in both orders {agreement:.2f}" if agreement else ""
            print(
                f"{name:36} {right / total:8.3f}  {interval.low:.3f} - {interval.high:.3f}"
                f"   {seconds:7.1f}{told}",
                flush=True,
            )


def write_pairs(data: Path, pairs: int, seed: int, to: Path) -> None:
    rows = [json.loads(line) for line in data.open(encoding="utf-8")]
    draw = random.Random(seed)
    sides = [
        draw.sample([row["text"] for row in rows if row["label"] == label], pairs)
        for label in ("pos", "neg")
    ]
    with to.open("w", encoding="utf-8") as file:
        for chosen, rejected in zip(*sides, strict=True):
            row = {"prompt": PROMPT, "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(row) + "\n")


def without_examples(constitution: Path, to: Path) -> Path:
    tables = tomllib.loads(constitution.read_text("utf-8"))
    for principle in tables["principle"]:
        principle.pop("example", None)
    to.write_text(tomli_w.dumps(tables), "utf-8")
    return to


def label(pairs: Path, constitution: Path, judge: str, out: Path, flags: list[str]) -> None:
    command = [sys.executable, "-m", "aif", "label", "--pairs", pairs, "--out", out, "--quiet"]
    command += ["--constitution", constitution, "--judge", judge, *flags]
    subprocess.run(command, check=True)


def score(run: Path) -> tuple[int, int, float | None]:
    """(pairs in which the positive text won, pairs, mean agreement of the two orders)."""
    labels = [json.loads(line) for line in (run / "labels.jsonl").open()]
    human = {
        row["comparison_id"]: row["p_first"]
        for row in map(json.loads, (run / "human.jsonl").open())
    }
    right = sum(
        row["p_first"] is not None and (row["p_first"] > 0.5) == (human[row["comparison_id"]] > 0.5)
        for row in labels
    )
    agreements = [row["order_agreement"] for row in labels if row["order_agreement"] is not None]
    return right, len(labels), sum(agreements) / len(agreements) if agreements else None


if __name__ == "__main__":
    main()
