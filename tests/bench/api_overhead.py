"""What a client costs on top of the server's own time: aif against the bare SDK and its peers.

    python tests/bench/api_overhead.py                      # aif and the bare SDK
    python tests/bench/api_overhead.py --peers /tmp/peers   # and curator and distilabel
    python tests/bench/api_overhead.py --in-flight 50 --sigma 0.5

One local server with a fixed latency, the same conversations and max_tokens for everybody (checked
by hash at the server), every contender a process of its own with imports not counted, runs
interleaved, medians shown. The span is what the server saw, from the first request to the last
answer: it leaves out what a peer does once, before and after. aif runs its whole `label` stage: it
reads and checks the pairs, renders the prompts (the others get them ready), asks, journals durably
and aggregates the labels.
The peers want environments of their own:

    python3 -m venv /tmp/peers/curator;    /tmp/peers/curator/bin/pip install \\
        bespokelabs-curator==0.1.31
    python3 -m venv /tmp/peers/distilabel; /tmp/peers/distilabel/bin/pip install \\
        'distilabel[openai]==1.5.3' requests
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from aif.config.settings import LabelSettings, LLMSettings  # noqa: E402
from aif.constitution.file import load  # noqa: E402
from aif.data.readers import read_pairs  # noqa: E402
from aif.judge.judge import Judge  # noqa: E402
from tests.bench.peer_clock import MODEL  # noqa: E402
from tests.support.server import Serving, serving  # noqa: E402

RUN_S = 300  # a contender that takes longer has failed
TARGET = 0.85  # of the bare SDK's throughput
CONSTITUTION = """
name = "overhead"
[[principle]]
id = "kindness"
compare = "Which response is kinder to the person?"
"""


def write_inputs(folder: Path, calls: int) -> Path:
    """Pairs, a constitution of one principle, and the conversations that `aif label` makes of
    them (pairwise, both orders, so two a pair), which the others are given ready to send."""
    (folder / "constitution.toml").write_text(CONSTITUTION)
    first = "Thank you for telling me. That sounds hard, and it makes sense that you feel this way."
    second = "Everybody has problems. Read the documentation again and do what it says there."
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(calls // 2):
            prompt = f"I have failed my exam number {number} and do not know what to do next."
            row = {"prompt": prompt, "response_a": f"{first} {first}", "response_b": second}
            file.write(json.dumps(row) + "\n")
    judge = Judge(
        load(folder / "constitution.toml"),
        LLMSettings(model=f"openai:{MODEL}", max_tokens=1, logprobs=False),
        LabelSettings(),
    )
    messages = folder / "messages.jsonl"
    with messages.open("w") as file:
        for pair in read_pairs(str(folder / "pairs.jsonl")):
            for call in judge.calls_for(pair.comparison):
                file.write(json.dumps(judge.ask(call, pair.comparison).messages) + "\n")
    return messages


def contenders(peers: Path | None) -> dict[str, tuple[str, Path]]:
    """Name -> (the Python that has it, its script)."""
    found = {name: (sys.executable, HERE / f"peer_{name}.py") for name in ("bare", "aif")}
    if peers is not None:
        for name in ("curator", "distilabel"):
            found[name] = (str(peers / name / "bin" / "python"), HERE / f"peer_{name}.py")
    return found


def run_once(
    python: str, script: Path, messages: Path, server: Serving, in_flight: int
) -> dict[str, Any]:
    """One run of one contender: what it says of itself and what the server saw."""
    server.reset()
    with tempfile.TemporaryDirectory() as folder:
        command = [python, str(script), str(messages), server.base_url, str(in_flight), folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S)
    if done.returncode != 0:
        raise SystemExit(f"{script.name} failed:\n{done.stderr[-3000:]}")
    seen = server.stats(detail=True)
    return json.loads(done.stdout) | {
        "span_s": seen["span_s"],
        "requests": seen["requests"],
        "peak": seen["peak_in_flight"],
        "asked": frozenset(seen["by_prompt"]),
    }


def measure(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Every contender in turn, `options.runs` times over."""
    field = contenders(options.peers)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in field}
    latency = {"latency_ms": options.latency_ms, "latency_sigma": options.sigma}
    with tempfile.TemporaryDirectory() as folder, serving(**latency) as server:
        messages = write_inputs(Path(folder), options.count)
        for turn in range(options.runs):
            for name, (python, script) in field.items():
                result = run_once(python, script, messages, server, options.in_flight)
                results[name].append(result)
                print(f"run {turn + 1} {name}: {result['seconds']:.2f} s", file=sys.stderr)
    asked = {result["asked"] for runs in results.values() for result in runs}
    if len(asked) != 1:
        raise SystemExit("the contenders did not ask the same questions")
    return results


def table(results: dict[str, list[dict[str, Any]]], count: int) -> str:
    """Medians, one line a contender, and the ratios of throughput."""
    middle = {
        name: {
            key: statistics.median(run[key] for run in runs)
            for key in ("seconds", "span_s", "user_cpu_s", "rss_mb", "peak", "requests", "faults")
        }
        for name, runs in results.items()
    }
    lines = [
        f"{'':12}{'req/s':>8}{'wall s':>8}{'span s':>8}{'CPU s':>8}{'RSS MB':>8}"
        f"{'peak':>6}{'asked':>7}{'faults':>8}"
    ]
    for name, row in middle.items():
        lines.append(
            f"{name:12}{count / row['seconds']:8.0f}{row['seconds']:8.2f}{row['span_s']:8.2f}"
            f"{row['user_cpu_s']:8.2f}{row['rss_mb']:8.0f}{row['peak']:6.0f}"
            f"{row['requests']:7.0f}{row['faults']:8.0f}"
        )
    own = middle["aif"]
    for name, row in middle.items():
        if name != "aif":
            wall, span = row["seconds"] / own["seconds"], row["span_s"] / own["span_s"]
            lines.append(f"aif / {name}: {wall:.2f} by the client's clock, {span:.2f} by the span")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=3000, help="calls, two a comparison")
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--latency-ms", type=float, default=100)
    parser.add_argument("--sigma", type=float, default=0, help="lognormal spread; 0: fixed latency")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peers", type=Path, help="folder of their virtual environments")
    options = parser.parse_args()
    results = measure(options)
    print(table(results, options.count))
    bare, own = (statistics.median(r["seconds"] for r in results[n]) for n in ("bare", "aif"))
    if bare / own < TARGET:
        raise SystemExit(f"aif is below {TARGET} of the bare SDK")


if __name__ == "__main__":
    main()
