"""What an edit to a constitution costs: calls that a server counts after a finished labelling.

    python tests/bench/edit.py
    python tests/bench/edit.py --comparisons 100

Also how long `aif --help` takes. Targets: an edited question costs its principle's calls, a weight
costs none, and help is there within 0.3 s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.server import serving

ROOT = Path(__file__).resolve().parents[2]
CONSTITUTION = "\n".join(
    ['name = "bench"']
    + [
        f'[[principle]]\nid = "{name}"\nweight = 1.0\ncompare = "Which shows more {name}?"'
        for name in ("kindness", "honesty", "care", "clarity")
    ]
)
EDITS: dict[str, tuple[Callable[[str], str], float]] = {  # name -> edit, share of the calls
    "nothing": (lambda text: text, 0),
    "one principle's question": (lambda text: text.replace("more care", "greater care"), 1 / 4),
    "the edit undone": (lambda text: CONSTITUTION, 0),
    "only a weight": (lambda text: text.replace("weight = 1.0", "weight = 3.0", 1), 0),
    "a principle added": (
        lambda text: text + '\n[[principle]]\nid = "wit"\ncompare = "Which is wittier?"',
        1 / 4,
    ),
    "the preamble": (lambda text: f'preamble = "Be strict."\n{text}', 5 / 4),
}


def aif(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aif", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)


def measure(comparisons: int, folder: Path) -> list[tuple[str, int, int, float]]:
    """(edit, calls made, calls due, seconds) for the first labelling and each edit after it."""
    pairs, constitution = folder / "pairs.jsonl", folder / "c.toml"
    with pairs.open("w") as file:
        for n in range(comparisons):
            row = {"prompt": f"prompt {n}", "response_a": f"left {n}", "response_b": f"right {n}"}
            file.write(json.dumps(row) + "\n")
    text = CONSTITUTION
    found = []
    with serving() as server:
        judge = ["--judge", "openai:test-model", "--base-url", server.base_url]
        command = ["label", "--out", folder / "run", "--pairs", pairs]
        command += ["--constitution", constitution, *judge, "--quiet"]
        calls = comparisons * 4 * 2
        first = {"the first labelling": (lambda text: text, 1)}
        for name, (edit, share) in (first | EDITS).items():
            text = edit(text)
            constitution.write_text(text)
            server.reset()
            start = time.perf_counter()
            aif(*command)
            seconds = time.perf_counter() - start
            found.append((name, server.stats()["requests"], round(calls * share), seconds))
    return found


def help_s(times: int = 10) -> float:
    """Median seconds of `aif --help`."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        aif("--help")
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--comparisons", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options.comparisons, Path(folder))
    print(f"{options.comparisons:,} comparisons, 4 principles, both orders")
    print(f"{'edited':26} {'calls':>8} {'due':>8} {'seconds':>8}")
    for name, calls, due, seconds in found:
        print(f"{name:26} {calls:8,} {due:8,} {seconds:8.1f}")
    print(f"aif --help: {help_s():.2f} s (median of 10)")
    if any(calls != due for _, calls, due, _ in found):
        raise SystemExit("an edit cost other calls than its own")


if __name__ == "__main__":
    main()
