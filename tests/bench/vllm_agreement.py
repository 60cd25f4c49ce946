"""Whether vLLM in this process judges as transformers does: the same pairs labelled by both.

    .venv-vllm/bin/python tests/bench/vllm_agreement.py --reviews rt_polarity.jsonl [--pairs 300]
    .venv-vllm/bin/python tests/bench/vllm_agreement.py --data pairs.jsonl --constitution FILE

`--reviews` are pairs of one positive and one negative sentence (Pang & Lee 2005) under
`constitutions/positivity.toml`, as in judge_quality.py; `--data` any pairs, under
`constitutions/warm.toml` or another. Told are the mean distance of p_first, the share of decisions
(labels, and principles within them) that have the same winner, with 95 % Wilson intervals, and how
near to even those are that have another.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import islice
from pathlib import Path
from statistics import fmean

from judge_quality import label, write_pairs

from aif.stats.intervals import wilson

ROOT = Path(__file__).resolve().parents[2]
JUDGES = {"transformers": "smollm2-135m", "vllm": "vllm:smollm2-135m"}
Decided = tuple[float, float]  # p_first by transformers and by vLLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--reviews", type=Path, help="rt_polarity.jsonl")
    given.add_argument("--data", type=Path, help="pairs, JSONL")
    parser.add_argument("--constitution", type=Path)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, help="keep the runs here; a second call resumes")
    options = parser.parse_args()
    name = "positivity" if options.reviews else "warm"
    constitution = options.constitution or ROOT / "constitutions" / f"{name}.toml"
    with tempfile.TemporaryDirectory() as scratch:
        work = options.out or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        pairs = work / "pairs.jsonl"
        if options.reviews:
            write_pairs(options.reviews, options.pairs, 0, pairs)
        else:
            with options.data.open(encoding="utf-8") as rows:
                pairs.write_text("".join(islice(rows, options.pairs)), "utf-8")
        flags = ["--set", f"judge.dtype={options.dtype}"]
        for name, judge in JUDGES.items():
            label(pairs, constitution, judge, work / name, flags)
        tell(*(read(work / name) for name in JUDGES))


def read(run: Path) -> dict[str, dict]:
    """The run's labels by their comparison."""
    rows = map(json.loads, (run / "labels.jsonl").open(encoding="utf-8"))
    return {row["comparison_id"]: row for row in rows}


def tell(ours: dict[str, dict], theirs: dict[str, dict]) -> None:
    """Both decisions by both judges."""
    whole = [(ours[key]["p_first"], theirs[key]["p_first"]) for key in ours]
    parts = [
        (p, theirs[key]["by_principle"][name])
        for key, row in ours.items()
        for name, p in row["by_principle"].items()
    ]
    for name, decided in (("labels", whole), ("principles", parts)):
        known = [(a, b) for a, b in decided if a is not None and b is not None]
        flips = [(a, b) for a, b in known if (a > 0.5) != (b > 0.5)]
        same = len(known) - len(flips)
        low, high = wilson(same, len(known))
        off = fmean(abs(a - b) for a, b in known)
        nearest = max((min(abs(a - 0.5), abs(b - 0.5)) for a, b in flips), default=0.0)
        print(
            f"{name}: {len(known)} of {len(decided)} by both, mean |dp| {off:.4f}, same winner "
            f"{same / len(known):.3f} ({low:.3f} to {high:.3f}); of the {len(flips)} others one "
            f"side is within {nearest:.3f} of even"
        )


if __name__ == "__main__":
    main()
