"""How long a finished or nearly finished run of a million calls takes to open again.

    python tests/bench/journal_resume.py                      125,000 comparisons, 4 principles
    python tests/bench/journal_resume.py --comparisons 6250   a twentieth of it

Each figure is of a fresh `aif` process. Targets: the first call is asked within 20 s, below 1 GB.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from aif.config.settings import LabelSettings, LLMSettings
from aif.constitution import file as constitutions
from aif.data.readers import read_pairs
from aif.judge.judge import Judge
from aif.store.journal import encode
from tests.support.server import serving

ROOT = Path(__file__).resolve().parents[2]
MODEL = "openai:test-model"
PRINCIPLES = ("kindness", "honesty", "care", "clarity")
INDEX = """
import sys, time
from pathlib import Path
from aif.store.journal import Index
start = time.perf_counter()
index = Index.read(Path(sys.argv[1]))
print(len(index.answered), time.perf_counter() - start)
"""

# The kernel counts a child's peak memory from its parent's size on, so the parent is a small one.
LAUNCH = """
import os, sys
pid = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[1:]], os.environ)
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def write_constitution(path: Path) -> None:
    blocks = [
        f'[[principle]]\nid = "{name}"\ncompare = "Which response shows more {name}?"\n'
        for name in PRINCIPLES
    ]
    path.write_text('name = "bench"\n\n' + "\n".join(blocks))


def write_pairs(path: Path, comparisons: int) -> None:
    words = [f"word{number}" for number in range(100)]
    draw = random.Random(0)

    def text(n_words: int) -> str:
        return " ".join(draw.choices(words, k=n_words))

    with path.open("w") as file:
        for number in range(comparisons):
            row = {
                "prompt": f"{number}: {text(30)}",
                "response_a": text(60),
                "response_b": text(60),
            }
            file.write(json.dumps(row) + "\n")


def journal_lines(judge: Judge, pairs: Path) -> Iterator[bytes]:
    """A row for every call of every pair, as an answer from a server leaves it."""
    draw = random.Random(1)
    for pair in read_pairs(str(pairs)):
        for call in judge.calls_for(pair.comparison):
            log_p = -draw.random() * 3 - 1e-3
            yield encode(
                {
                    "id": call.id,
                    "fault": None,
                    "texts": ["A"],
                    "finish": "stop",
                    "logprobs": {"A": log_p, "B": -draw.random() * 3},
                    "detail": "",
                    "usage": {"prompt_tokens": 412, "completion_tokens": 1},
                }
            )


def build(folder: Path, base_url: str, comparisons: int) -> list[str]:
    """A run folder whose journal is complete; returns the arguments of `aif` that go with it."""
    pairs, constitution, run = folder / "pairs.jsonl", folder / "c.toml", folder / "run"
    write_constitution(constitution)
    write_pairs(pairs, comparisons)
    model = LLMSettings(model=MODEL, base_url=base_url)
    judge = Judge(constitutions.load(constitution), model, LabelSettings())
    (run / "journal").mkdir(parents=True)
    with (run / "journal" / "label.jsonl").open("wb") as file:
        file.writelines(journal_lines(judge, pairs))
    files = ["--pairs", str(pairs), "--constitution", str(constitution)]
    return ["label", "--out", str(run), *files, "--judge", MODEL, "--base-url", base_url, "--json"]


def drop_lines(path: Path, count: int) -> None:
    """Take `count` rows out of a journal, spread over it."""
    with path.open("rb") as file:
        dropped = set(random.Random(2).sample(range(sum(1 for _ in file)), count))
        file.seek(0)
        with path.with_suffix(".new").open("wb") as kept:
            kept.writelines(line for n, line in enumerate(file) if n not in dropped)
    path.with_suffix(".new").replace(path)


def timed(command: list[str]) -> tuple[float, int, str]:
    """Wall seconds, peak bytes in memory and standard output of a process of its own."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, *command], cwd=ROOT, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{command[:3]} ended with {done.returncode}: {done.stderr}")
    *said, peak = done.stdout.splitlines()
    return seconds, int(peak) * 1024, "\n".join(said)


def measure(comparisons: int, missing: int, folder: Path) -> dict[str, float]:
    """Seconds and peak megabytes of opening, of a run with nothing left, and to the first ask."""
    with serving() as server:
        command = build(folder, server.base_url, comparisons)
        journal = folder / "run" / "journal" / "label.jsonl"
        found = {
            "rows": comparisons * 2 * len(PRINCIPLES),
            "journal_mb": mb(journal.stat().st_size),
        }
        _, rss, said = timed(["-c", INDEX, str(journal)])
        found |= {"open_s": float(said.split()[1]), "open_mb": mb(rss)}
        wall, rss, said = timed(["-m", "aif", *command])
        summary = json.loads(said.splitlines()[-1])
        assert (summary["calls_made"], summary["labels"]) == (0, comparisons), summary
        assert server.stats()["requests"] == 0
        found |= {"idle_run_s": wall, "idle_run_mb": mb(rss)}
        drop_lines(journal, missing)
        began = time.monotonic()  # the server's clock is the same
        wall, rss, said = timed(["-m", "aif", *command])
        stats = server.stats()
        assert stats["requests"] == stats["distinct"] == missing, stats
        found |= {"first_ask_s": stats["first_s"] - began, "run_s": wall, "run_mb": mb(rss)}
    return found


def mb(size: int) -> float:
    return size / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--comparisons", type=int, default=125_000)
    parser.add_argument("--missing", type=int, default=1000, help="rows taken out at the end")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.comparisons, options.missing, Path(folder))
    print(f"{found['rows']:,} rows, {found['journal_mb']:,.0f} MB")
    print(f"{'':36} {'seconds':>8} {'peak MB':>8}")
    for name, seconds, peak in (
        ("open the journal", "open_s", "open_mb"),
        ("aif label, nothing left to ask", "idle_run_s", "idle_run_mb"),
        (f"first ask, {options.missing:,} rows missing", "first_ask_s", "run_mb"),
        ("the same until it is done", "run_s", "run_mb"),
    ):
        print(f"{name:36} {found[seconds]:8.1f} {found[peak]:8.0f}")


if __name__ == "__main__":
    main()
