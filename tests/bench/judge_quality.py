"""How well the bundled judge tells a positive movie review from a negative one.

    python tests/bench/judge_quality.py --data ../shared/data/sentiment/rt_polarity.jsonl

Pairs of one positive and one negative sentence (Pang & Lee 2005) are labelled by `aif label` with
`constitutions/positivity.toml`, by each way of asking (`--protocol NAME` for some of them); the
table has the share of pairs in which the positive one wins, with a 95 % Wilson interval, how many
labels are null or even, which count as wrong, and the seconds it took. `reasoned` is read twice:
with the verdicts held in 0.4 to 0.6, and as they are, which is no further call.
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
AS_IT_IS = ["--set", "label.clamp=[0,1]"]
PROMPT = "Review a movie you have seen, in one sentence."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge", default="smollm2-135m")
    parser.add_argument("--protocol", action="append", help="only this one; repeatable")
    parser.add_argument("--reason-tokens", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_pairs(arguments.data, arguments.pairs, arguments.seed, work / "pairs.jsonl")
        zero_shot = without_examples(CONSTITUTION, work / "zero-shot.toml")
        print(f"{'how':36} {'accuracy':>8}  {'95 % interval':15} null even {'seconds':>7}")
        reasons = ["--set", f"judge.max_tokens={arguments.reason_tokens}"]
        as_chat = ["--set", "judge.form=chat"]
        for name, constitution, flags in (
            ("pointwise, text, few-shot", CONSTITUTION, []),
            ("pointwise, text, zero-shot", zero_shot, []),
            ("pointwise, chat, few-shot", CONSTITUTION, as_chat),
            ("pointwise, chat, zero-shot", zero_shot, as_chat),
            ("pairwise, text", CONSTITUTION, []),
            ("pairwise, chat", CONSTITUTION, as_chat),
            ("rating, text, few-shot", CONSTITUTION, []),
            ("rating, text, zero-shot", zero_shot, []),
            ("rating, chat, few-shot", CONSTITUTION, as_chat),
            ("rating, chat, zero-shot", zero_shot, as_chat),
            ("reasoned, text", CONSTITUTION, reasons),
            ("reasoned, text, not clamped", CONSTITUTION, [*reasons, *AS_IT_IS]),
            ("reasoned, chat", CONSTITUTION, [*reasons, *as_chat]),
            ("reasoned, chat, not clamped", CONSTITUTION, [*reasons, *as_chat, *AS_IT_IS]),
        ):
            protocol = name.partition(",")[0]
            if arguments.protocol and protocol not in arguments.protocol:
                continue
            began = time.perf_counter()
            run = work / name.replace(", not clamped", "").replace(",", "").replace(" ", "-")
            flags = ["--protocol", protocol, *flags]
            label(work / "pairs.jsonl", constitution, arguments.judge, run, flags)
            seconds = time.perf_counter() - began
            right, total, agreement, null, even = score(run)
            interval = binomtest(right, total).proportion_ci(method="wilson")
            told = f"   same winner in both orders {agreement:.2f}" if agreement else ""
            print(
                f"{name:36} {right / total:8.3f}  {interval.low:.3f} - {interval.high:.3f}"
                f" {null:4} {even:4} {seconds:7.1f}{told}",
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
    command += ["--constitution", constitution, "--judge", judge, *flags, "--max-fault-rate", "1"]
    subprocess.run(command, check=True)


def score(run: Path) -> tuple[int, int, float | None, int, int]:
    """(pairs in which the positive text won, pairs, mean agreement of the two orders, null and
    even labels)."""
    labels = [json.loads(line) for line in (run / "labels.jsonl").open()]
    human = {
        row["comparison_id"]: row["p_first"]
        for row in map(json.loads, (run / "human.jsonl").open())
    }
    right = sum(
        row["p_first"] not in (None, 0.5)
        and (row["p_first"] > 0.5) == (human[row["comparison_id"]] > 0.5)
        for row in labels
    )
    agreements = [row["order_agreement"] for row in labels if row["order_agreement"] is not None]
    agreement = sum(agreements) / len(agreements) if agreements else None
    null, even = (sum(row["p_first"] == p for row in labels) for p in (None, 0.5))
    return right, len(labels), agreement, null, even


if __name__ == "__main__":
    main()
