"""Everything a server does wrong, by name, for `server.py`.

STATUSES come with an error body, BODIES replace the body of a 200, WIRE breaks the connection.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

Body = dict[str, Any]

# kind -> (status, error code, error message)
STATUSES = {
    "400": (400, "invalid_request_error", "Unsupported value"),
    "no_structure": (400, "unknown_parameter", "Unknown parameter: 'response_format'."),
    "401": (401, "invalid_api_key", "Incorrect API key provided"),
    "402": (402, None, "Insufficient balance"),
    "403": (403, None, "Forbidden"),
    "404": (404, "model_not_found", "The model does not exist"),
    "408": (408, None, "Request timeout"),
    "409": (409, None, "Conflict"),
    "425": (425, None, "Too early"),
    "429": (429, "rate_limit_exceeded", "Rate limit reached"),
    "500": (500, "server_error", "The server had an error"),
    "503": (503, None, "Overloaded"),
    "quota": (429, "insufficient_quota", "You exceeded your current quota"),
    "too_long": (400, "context_length_exceeded", "This model's maximum context length is 10"),
    "too_long_words": (400, None, "the prompt exceeds the maximum context length of 2048 tokens"),
    "moderated": (403, None, "Your input was flagged by moderation"),
    "content_filter_400": (400, "content_filter", "The prompt triggered a content policy"),
}


def first_choice(body: Body, **changes: object) -> bytes:
    """The body with its first choice changed; None values are kept, as servers send them."""
    body["choices"][0].update(changes)
    return json.dumps(body).encode()


def with_text(body: Body, content: object, finish: str = "stop", **more: object) -> bytes:
    """The body with another text and no log-probabilities."""
    choice: dict[str, object] = {"logprobs": None, "finish_reason": finish}
    if "message" in body["choices"][0]:
        choice["message"] = {"role": "assistant", "content": content, **more}
    else:
        choice["text"] = content
    return first_choice(body, **choice)


def replaced(body: Body, old: str, new: str) -> bytes:
    """The body's JSON with a piece of its text replaced."""
    text = json.dumps(body)
    assert old in text, old
    return text.replace(old, new).encode()


BODIES: dict[str, Callable[[Body], bytes]] = {
    "html": lambda body: b"<html><body>502 Bad Gateway</body></html>",
    "error": lambda body: b'{"error": {"message": "the engine died", "code": "dead"}}',
    "nothing": lambda body: b"",
    "array": lambda body: b"[]",
    "no_choices": lambda body: json.dumps(body | {"choices": []}).encode(),
    "null_choices": lambda body: json.dumps(body | {"choices": None}).encode(),
    "null_content": lambda body: with_text(body, None),
    "empty": lambda body: with_text(body, ""),
    "list_content": lambda body: with_text(body, [{"type": "text", "text": "A"}]),
    "wrong_model": lambda body: json.dumps(body | {"model": "another-model"}).encode(),
    "garbage": lambda body: with_text(body, "purple monkey dishwasher"),
    "refusal": lambda body: with_text(body, None, refusal="I cannot help with that."),
    "content_filter": lambda body: with_text(body, None, finish="content_filter"),
    "length": lambda body: with_text(body, "Let me think about", finish="length"),
    "length_empty": lambda body: with_text(body, "", finish="length"),
    "surrogate": lambda body: with_text(body, "A \ud800"),
    "no_usage": lambda body: json.dumps(body | {"usage": None}).encode(),
    "no_logprobs": lambda body: first_choice(body, logprobs=None),
    "nan": lambda body: replaced(body, '"created": 1700000000', '"created": NaN'),
    "positive_logprob": lambda body: replaced(body, '"logprob": -', '"logprob": 9'),
    "duplicate_keys": lambda body: replaced(body, '"index": 0', '"index": 0, "index": 0'),
    "big_int": lambda body: replaced(body, "1700000000", "9" * 5000),
    "deep": lambda body: replaced(body, "1700000000", "[" * 100_000 + "]" * 100_000),
    "bad_utf8": lambda body: json.dumps(body).encode() + b"\xff\xfe",
    "truncated_json": lambda body: json.dumps(body).encode()[:-40],
    "huge": lambda body: with_text(body, "x" * 10_000_000),
}


async def respond(http: web.BaseRequest, fault: dict[str, Any], body: Body) -> web.StreamResponse:
    """Answer a request with the fault of this kind.

    With `echo` an error's message repeats the caller's key, as some servers do.
    """
    kind = fault["kind"]
    if kind in STATUSES:
        return refuse(http, fault)
    if kind in BODIES:
        content = BODIES[kind](body)
        if fault.get("echo"):
            content = content.replace(b"engine", http.headers["Authorization"].encode())
        form = "text/html" if kind == "html" else "application/json"
        return web.Response(body=content, content_type=form)
    return await WIRE[kind](http, json.dumps(body).encode())


def refuse(http: web.BaseRequest, fault: dict[str, Any]) -> web.Response:
    """An error status.

    `retry_after` is sent as it is, but for "date+N": an HTTP date N seconds from now; `skew`
    moves the server's own clock (both its dates) by that many seconds.
    """
    status, code, message = STATUSES[fault["kind"]]
    if fault.get("echo"):
        message += ": " + http.headers.get("Authorization", "")
    headers = {}
    now = time.time() + fault.get("skew", 0)
    after = fault.get("retry_after")
    if after is not None:
        if str(after).startswith("date"):
            headers["Date"] = email.utils.formatdate(now, usegmt=True)
            after = email.utils.formatdate(now + float(str(after)[4:]), usegmt=True)
        headers["Retry-After"] = str(after)
    error = {"message": message, "type": "error", "code": code}
    return web.json_response({"error": error}, status=status, headers=headers)


async def hang(http: web.BaseRequest, content: bytes) -> web.StreamResponse:
    """Say nothing for an hour."""
    await asyncio.sleep(3600)
    return web.Response()


async def cut(http: web.BaseRequest, content: bytes) -> web.StreamResponse:
    """Promise the whole body, send half of it and close."""
    response = web.StreamResponse(headers={"Content-Length": str(len(content))})
    await response.prepare(http)
    await response.write(content[: len(content) // 2])
    http.transport.close()
    return response


async def reset(http: web.BaseRequest, content: bytes) -> web.StreamResponse:
    """Close without a word."""
    http.transport.abort()
    return web.Response()


async def drip(http: web.BaseRequest, content: bytes) -> web.StreamResponse:
    """A byte each 50 ms, which no timeout between two reads will notice."""
    response = web.StreamResponse(headers={"Content-Length": str(len(content))})
    await response.prepare(http)
    for byte in content:
        await response.write(bytes([byte]))
        await asyncio.sleep(0.05)
    return response


WIRE: dict[str, Callable[[web.BaseRequest, bytes], Awaitable[web.StreamResponse]]] = {
    "hang": hang,
    "cut": cut,
    "reset": reset,
    "drip": drip,
}
