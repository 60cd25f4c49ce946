"""A local OpenAI-compatible server for tests and benchmarks; it answers the same to the same.

    python -m tests.support.server --port 8000 --latency-ms 100
    python -m tests.support.server --faults '[{"kind": "429", "retry_after": "0.1", "p": 0.02}]'

It prints one line, its port. A verdict, or free text, comes from the sha256 of the request's
messages, so any two runs agree. `GET /stats` counts the requests; `POST /faults` replaces the
faults, a list of

    {"kind": NAME, "first": N}            the first N requests that match
    {"kind": NAME, "p": 0.02}             that share of requests, the same ones in every run
    {"kind": NAME, "match": "words"}      requests whose messages hold these words
    {"kind": NAME, "times": N}            at most N times for any one message list
    {"kind": NAME, "above": N}            at once, while more than N requests are in flight

which may be combined; the first that applies wins. For NAME see `server_faults.py` beside this
file. In a test:

    with serving(latency_ms=5, faults=[{"kind": "503", "first": 3}]) as server:
        ... server.base_url ... server.stats()
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import math
import random
import re
import select
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support import server_protocols

MODEL = "test-model"
ROOT = Path(__file__).parents[2]
START_S = 120  # how long `serving` waits for the port


class Serving:
    """A running server as a test sees it."""

    def __init__(self, process: subprocess.Popen[str], port: int):
        self.process = process
        self.root = f"http://127.0.0.1:{port}"
        self.base_url = f"{self.root}/v1"

    def stats(self, *, detail: bool = False) -> dict[str, Any]:
        """Counts since the start or the last reset; see `Stats.report`."""
        query = "?detail" if detail else ""
        with urllib.request.urlopen(f"{self.root}/stats{query}", timeout=10) as response:
            return json.load(response)

    def set_faults(self, *faults: dict[str, Any]) -> None:
        """From now on these faults, counted afresh."""
        self._post("/faults", faults)

    def reset(self) -> None:
        """Forget what was counted; faults stay."""
        self._post("/reset", None)

    def _post(self, path: str, body: object) -> None:
        data = json.dumps(body).encode()
        urllib.request.urlopen(f"{self.root}{path}", data=data, timeout=10).close()


@contextlib.contextmanager
def serving(**options: Any) -> Iterator[Serving]:
    """A server process for the length of a `with`; options are those of the command line."""
    options["faults"] = json.dumps(options.get("faults", []))
    command = [sys.executable, "-m", "tests.support.server", "--port", "0", "--with-parent"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    try:
        if not select.select([process.stdout], [], [], START_S)[0]:
            raise TimeoutError(f"the test server printed no port within {START_S} s")
        yield Serving(process, int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


class Stats:
    """Counts of requests, per distinct message list."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()  # sha256 of the messages -> requests
        self.answered: Counter[str] = Counter()  # ... -> completions sent without a fault
        self.faults: Counter[str] = Counter()  # kind -> times
        # Tokens of every request that was not refused, whether or not its answer arrived.
        self.billed: Counter[str] = Counter()
        self.probes = 0  # requests without a message: a client looks at the headers
        self.authorizations: set[str] = set()
        self.in_flight = 0
        self.peak_in_flight = 0
        self.first_s: float | None = None
        self.last_s: float | None = None

    def begin(self, prompt_hash: str, authorization: str) -> None:
        self.requests[prompt_hash] += 1
        self.authorizations.add(authorization)
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        if self.first_s is None:
            self.first_s = time.monotonic()

    def end(self) -> None:
        self.in_flight -= 1
        self.last_s = time.monotonic()

    def report(self, detail: bool) -> dict[str, Any]:
        """Totals; times in seconds on the server's monotonic clock. `detail` adds every hash."""
        totals = {
            "requests": self.requests.total(),
            "distinct": len(self.requests),
            "duplicates": self.requests.total() - len(self.requests),
            "answered": self.answered.total(),
            "answered_twice": self.answered.total() - len(self.answered),
            "faults": dict(self.faults),
            "billed": dict(self.billed),
            "probes": self.probes,
            "authorizations": sorted(self.authorizations),
            "in_flight": self.in_flight,
            "peak_in_flight": self.peak_in_flight,
            "first_s": self.first_s,
            "last_s": self.last_s,
            "span_s": self.last_s - self.first_s if self.last_s and self.first_s else None,
        }
        return totals | ({"by_prompt": dict(self.requests)} if detail else {})


class Chooser:
    """Which fault, if any, a request gets."""

    def __init__(self, faults: list[dict[str, Any]], seed: int):
        self.faults = faults
        self.seed = seed
        self.used = [0] * len(faults)
        self.seen: Counter[tuple[int, str]] = Counter()

    def choose(self, prompt_hash: str, prompt: str, in_flight: int) -> dict[str, Any] | None:
        for number, fault in enumerate(self.faults):
            if fault.get("match", "") not in prompt or in_flight <= fault.get("above", 0):
                continue
            if self.used[number] >= fault.get("first", math.inf):
                continue
            seen = self.seen[number, prompt_hash]
            if seen >= fault.get("times", math.inf):
                continue
            self.seen[number, prompt_hash] += 1
            if unit(self.seed, number, prompt_hash, seen) < fault.get("p", 1):
                self.used[number] += 1
                return fault
        return None


def unit(*parts: object) -> float:
    """A number in [0, 1) that depends on `parts` alone: no order of arrival changes it."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") / 2**64


def hash_of(prompt: str) -> str:
    """The sha256 of the JSON (keys sorted, not escaped) of the messages or the prompt."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()


def p_of(prompt_hash: str) -> float:
    """How probable the first option is, in [0.05, 0.95]."""
    return 0.05 + 0.9 * unit(prompt_hash)


FILLERS = [{"token": f" w{i}", "logprob": -12.0 - i / 8, "bytes": [119]} for i in range(20)]
VERDICT_TOKENS = 16  # a request for more, without log-probabilities, wants free text
YES_NO = re.compile(r"\byes\b.*\bno\b", re.I | re.S)


def completion(request: dict[str, Any], prompt: str, prompt_hash: str) -> dict[str, Any]:
    """The answer to a request, in the shape of its endpoint."""
    p = p_of(prompt_hash)
    pair = ("Yes", "No") if YES_NO.search(prompt[-400:]) else ("A", "B")
    text = pair[0] if p >= 0.5 else pair[1]
    chat = "messages" in request
    listed = int((request.get("top_logprobs") if chat else request.get("logprobs")) or 0)
    steps = server_protocols.steps(request, prompt[-400:], p, pair)
    if steps:
        text = "".join(token for token, _ in steps).removesuffix("<end>")
    elif not listed and (request.get("max_tokens") or 0) > VERDICT_TOKENS:
        text = f"Words {prompt_hash[:16]}."
    choices = []
    for index in range(request.get("n") or 1):
        logprobs = None
        if listed and steps:
            logprobs = server_protocols.logprobs(steps, listed, chat)
        elif listed:
            logprobs = option_logprobs(p, pair, text, listed, chat)
        content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choices.append({"index": index, **content, "logprobs": logprobs, "finish_reason": "stop"})
    n_prompt, n_said = len(prompt) // 4 + 1, len(choices)
    usage = {"prompt_tokens": n_prompt, "completion_tokens": n_said}
    return {
        "id": f"cmpl-{prompt_hash[:24]}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 1700000000,
        "model": request.get("model", MODEL),
        "choices": choices,
        "usage": usage | {"total_tokens": n_prompt + n_said},
    }


def option_logprobs(
    p: float, pair: tuple[str, str], text: str, listed: int, chat: bool
) -> dict[str, Any]:
    """Log-probabilities of the first token: `p` and 1 - p share 0.9, variants with a space 0.1."""
    top = []
    for token, share in zip(pair, (p, 1 - p), strict=True):
        top.append(
            {"token": token, "logprob": math.log(0.9 * share), "bytes": list(token.encode())}
        )
        top.append({"token": " " + token, "logprob": math.log(0.0999 * share), "bytes": None})
    top = sorted(top, key=lambda entry: -entry["logprob"]) + FILLERS
    top = top[:listed]
    own = next(entry for entry in top if entry["token"] == text)
    if chat:
        return {"content": [{**own, "top_logprobs": top}], "refusal": None}
    return {
        "tokens": [text],
        "token_logprobs": [own["logprob"]],
        "top_logprobs": [{entry["token"]: entry["logprob"] for entry in top}],
        "text_offset": [0],
    }


def build(options: argparse.Namespace):
    """The request handler; aiohttp is imported here so that `serving` costs nothing."""
    from aiohttp import web

    from tests.support import server_faults

    state = {"stats": Stats(), "chooser": Chooser(json.loads(options.faults), options.seed)}
    latencies = random.Random(options.seed)
    headers = {"Content-Type": "application/json"}

    async def delay() -> None:
        seconds = options.latency_ms / 1000
        if options.latency_sigma:  # a lognormal with that median
            seconds *= latencies.lognormvariate(0, options.latency_sigma)
        if seconds:
            await asyncio.sleep(seconds)

    async def control(path: str, raw: bytes, detail: bool) -> web.Response:
        if path == "/faults":
            state["chooser"] = Chooser(json.loads(raw), options.seed)
        elif path == "/reset":
            state["stats"] = Stats()
        elif path != "/stats":
            return web.json_response({"error": {"message": f"no path {path}"}}, status=404)
        return web.json_response(state["stats"].report(detail))

    async def handle(http: web.BaseRequest) -> web.StreamResponse:
        raw = await http.read()
        if http.path not in ("/v1/chat/completions", "/v1/completions"):
            return await control(http.path, raw, "detail" in http.query)
        request = json.loads(raw)
        messages = request["messages"] if "messages" in request else request["prompt"]
        prompt = json.dumps(messages, ensure_ascii=False, sort_keys=True)
        prompt_hash = hash_of(prompt)
        stats = state["stats"]
        if not messages:
            stats.probes += 1
            return web.json_response(completion(request, prompt, prompt_hash))
        stats.begin(prompt_hash, http.headers.get("Authorization", ""))
        try:
            fault = state["chooser"].choose(prompt_hash, prompt, stats.in_flight)
            body = completion(request, prompt, prompt_hash)
            if fault is None or fault["kind"] not in server_faults.STATUSES:
                stats.billed.update(body["usage"])
            if fault is None or "above" not in fault:
                await delay()
            if fault is not None:
                stats.faults[fault["kind"]] += 1
                return await server_faults.respond(http, fault, body)
            stats.answered[prompt_hash] += 1
            return web.Response(body=json.dumps(body).encode(), headers=headers)
        finally:
            stats.end()

    return handle


async def serve(options: argparse.Namespace) -> None:
    """Listen until killed, or until standard input ends when started by `serving`."""
    from aiohttp import web

    # As vLLM does, stop working for a client that has gone away.
    server = web.Server(build(options), access_log=None, handler_cancellation=True)
    runner = web.ServerRunner(server)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", options.port, backlog=4096)
    await site.start()
    print(site._server.sockets[0].getsockname()[1], flush=True)  # aiohttp has no other way
    ended = asyncio.Event()
    if options.with_parent:
        loop = asyncio.get_running_loop()

        def watch() -> None:
            sys.stdin.read()
            loop.call_soon_threadsafe(ended.set)

        threading.Thread(target=watch, daemon=True).start()
    await ended.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--latency-ms", type=float, default=0, help="of every answer")
    parser.add_argument("--latency-sigma", type=float, default=0, help="lognormal spread; 0: fixed")
    parser.add_argument("--faults", default="[]", help="JSON list, see the module's docstring")
    parser.add_argument("--seed", type=int, default=0, help="of latencies and of faults with p")
    parser.add_argument("--with-parent", action="store_true", help="stop when stdin ends")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
