"""What every contender of `api_overhead.py` has in common: the same input, one clock, one line out.

    python peer_NAME.py MESSAGES.jsonl BASE_URL IN_FLIGHT FOLDER

Standard library only: each contender runs in a virtual environment of its own.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable

MODEL = "test-model"
MAX_TOKENS = 1

# (conversations, base URL, requests in flight, a new folder) -> the texts, None for a failure
Contender = Callable[[list[list[dict[str, str]]], str, int, str], list[str | None]]


def measure(contender: Contender) -> None:
    """Run it once and print what it took; imports and reading the input are not counted."""
    path, base_url, in_flight, folder = sys.argv[1:5]
    with open(path, encoding="utf-8") as file:
        conversations = [json.loads(line) for line in file]
    real_stdout = os.dup(1)
    os.dup2(2, 1)  # contenders print progress; only the result may reach standard output
    cpu, start = user_cpu_s(), time.perf_counter()
    texts = contender(conversations, base_url, int(in_flight), folder)
    seconds, cpu = time.perf_counter() - start, user_cpu_s() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "seconds": seconds,
        "user_cpu_s": cpu,
        "rss_mb": peak / 1024,
        "rows": len(texts),
        "faults": sum(text is None for text in texts),
    }
    os.write(real_stdout, json.dumps(result).encode() + b"\n")


def user_cpu_s() -> float:
    """Of this process and of those it has waited for."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(resource.getrusage(each).ru_utime for each in who)
