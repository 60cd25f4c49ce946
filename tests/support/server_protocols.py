"""The test server's answers to asks for reasons, a rating or JSON, token by token.

As Qwen and many others do, it spells 10 in two tokens, 1 and 0.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

Step = tuple[str, dict[str, float]]  # a token, and the probabilities of all that might stand there

REASONED = re.compile(r"\bverdict\b", re.I)
RATING = re.compile(r"\bfrom 1 to 10\b")


def rating_of(p: float) -> int:
    """The rating that `p` in [0, 1] is most for."""
    return 1 + round(9 * p)


def steps(request: dict[str, Any], question: str, p: float, pair: tuple[str, str]) -> list[Step]:
    """The answer of this server to the end of a prompt, or [] for the plain kind.

    `p` is how probable the first option is.
    """
    likelier = pair[0] if p >= 0.5 else pair[1]
    schema = request.get("response_format", {}).get("json_schema", {}).get("schema")
    rating = RATING.search(question)
    verdict = _rating(p) if rating else [(likelier, {pair[0]: 0.9 * p, pair[1]: 0.9 * (1 - p)})]
    if schema:
        names = list(schema["properties"])
        fields = {"reasoning": 'It holds "verdict": "A".'} if "reasoning" in names else {}
        opening = json.dumps(fields | {"verdict": ""}).removesuffix('"}')
        return [*_plain(opening), *verdict, *_plain('"}')]
    if rating:
        return verdict
    if REASONED.search(question) and request.get("max_tokens", 0) > 16:
        spaced = [(" " + token, {" " + t: q for t, q in of.items()}) for token, of in verdict]
        return [*_plain("Some reasons, A before B.\nVerdict:"), *spaced]
    return []


def _plain(text: str) -> list[Step]:
    return [(token, {token: 0.99}) for token in re.findall(r"\w+|\W", text)]


def _rating(p: float) -> list[Step]:
    best = rating_of(p)
    near = {n: 0.6 if n == best else 0.1 for n in range(best - 2, best + 3) if 1 <= n <= 10}
    first = {str(n): q for n, q in near.items() if n < 10}
    if 10 in near:
        first["1"] = first.get("1", 0.0) + near[10]
    if best == 10:
        return [("1", first), ("0", {"0": near[10] / first["1"], "<end>": 1e-3})]
    after = [("<end>", {"<end>": 0.98, "0": 0.02})] if best == 1 else []
    return [(str(best), first), *after]


def logprobs(steps: list[Step], listed: int, chat: bool) -> dict[str, Any]:
    """The steps in the shape of an endpoint."""
    tops = [
        sorted(((t, math.log(q)) for t, q in of.items()), key=lambda entry: -entry[1])[:listed]
        for _, of in steps
    ]
    own = [math.log(of[token]) for token, of in steps]
    if chat:
        content = [
            {"token": token, "logprob": own[i], "bytes": None}
            | {"top_logprobs": [{"token": t, "logprob": q, "bytes": None} for t, q in tops[i]]}
            for i, (token, _) in enumerate(steps)
        ]
        return {"content": content, "refusal": None}
    return {
        "tokens": [token for token, _ in steps],
        "token_logprobs": own,
        "top_logprobs": [dict(top) for top in tops],
        "text_offset": [0] * len(steps),
    }
