"""The OpenAI wire format: an `Ask` to a request body, a response body to an `Answer`.

Nothing here opens a connection, so the batch API speaks it too. Reading is strict: whatever is
not a completion becomes an `Answer` with a fault, never an exception and never a text.
"""

from __future__ import annotations

import json
import math
from typing import Any

from aif import jsonl
from aif.llm import Answer, Ask, ended
from aif.records import LONE_SURROGATE

# What each endpoint lists at most: chat 20 by OpenAI's reference and vLLM's default; the older
# one 5 by OpenAI's (vLLM would take 20, but a server that follows the reference refuses it).
CHAT_TOP, TEXT_TOP = 20, 5

IMPOSSIBLE = -9999.0  # what OpenAI and vLLM send for a probability of 0


class NotACompletion(ValueError):
    """What is wrong with a body, in a few words."""


def path(ask: Ask) -> str:
    """The endpoint, below the base URL."""
    return "/completions" if ask.messages is None else "/chat/completions"


def body(ask: Ask, model: str, *, logprobs: bool) -> dict[str, Any]:
    """The request body; log-probabilities are asked for where the ask has options to read."""
    sent: dict[str, Any] = {"model": model}
    if ask.messages is None:
        sent["prompt"] = ask.text
    else:
        sent["messages"] = ask.messages
    sent["max_tokens"] = ask.max_tokens
    sent["temperature"] = ask.temperature
    if ask.samples > 1:
        sent["n"] = ask.samples
    if ask.temperature > 0 and ask.seed is not None:
        sent["seed"] = ask.seed
    if ask.stop:
        sent["stop"] = list(ask.stop)
    if ask.options and logprobs:
        if ask.messages is None:
            sent["logprobs"] = TEXT_TOP
        else:
            sent |= {"logprobs": True, "top_logprobs": CHAT_TOP}
    return sent


def encode(sent: dict[str, Any]) -> bytes:
    """The body as UTF-8 JSON; a lone surrogate, which UTF-8 cannot carry, becomes U+FFFD."""
    text = json.dumps(sent, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return LONE_SURROGATE.sub("\ufffd", text).encode()


def read(ask: Ask, raw: bytes, *, model: str | None, logprobs: bool) -> Answer:
    """The answer in a response body; with `model`, only that model may have given it."""
    try:
        reply = parse(raw)
        if reply.get("error"):
            raise NotACompletion("error: " + (error_in(reply)[1] or "no message"))
        echoed = reply.get("model")
        if model and isinstance(echoed, str) and echoed and not same_model(model, echoed):
            return Answer(ask.key, fault="wrong_model", detail=f"{plain(echoed, 80)!r} answered")
        return _read_choices(ask, reply, logprobs)
    except NotACompletion as error:
        return Answer(ask.key, fault="malformed", detail=str(error))


def _read_choices(ask: Ask, reply: dict[str, Any], logprobs: bool) -> Answer:
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices:
        raise NotACompletion("no choices")
    if not all(isinstance(choice, dict) for choice in choices):
        raise NotACompletion("a choice is not an object")
    if len(choices) > 1 and all(type(choice.get("index")) is int for choice in choices):
        choices = sorted(choices, key=lambda choice: choice["index"])
    choices = choices[: ask.samples]
    chat = ask.messages is not None
    texts = tuple(_text(choice, chat) for choice in choices)
    found = option_logprobs(choices[0], ask.options) if ask.options and logprobs else None
    finish = _finish(choices)
    usage = _usage(reply.get("usage"))
    if found is None and not any(text.strip() for text in texts):
        fault, detail = _silence(choices[0], finish, chat)
        return Answer(ask.key, finish=finish, fault=fault, detail=detail, usage=usage)
    # Not every server heeds `stop`.
    return ended(Answer(ask.key, texts, finish, found, usage=usage), ask.stop)


def parse(raw: bytes) -> dict[str, Any]:
    """A JSON object, or NotACompletion: no NaN, no key twice, no depth that overflows."""
    try:
        value = jsonl.loads(raw.decode())
    except ValueError as error:  # bad UTF-8, bad JSON, or an int of over 4,300 digits
        raise NotACompletion(f"not JSON ({str(error)[:80]}): {start_of(raw)}") from None
    if not isinstance(value, dict):
        raise NotACompletion(f"not a JSON object: {start_of(raw)}")
    return value


def plain(text: str, limit: int) -> str:
    """A server's words for a message: one line, no control characters, no lone surrogates."""
    printable = "".join(char if char.isprintable() else " " for char in text[: 2 * limit])
    return " ".join(printable.split())[:limit]


def start_of(raw: bytes) -> str:
    """The first words of a body, for a message."""
    return plain(raw[:400].decode("utf-8", "replace"), 100)


def error_in(reply: dict[str, Any]) -> tuple[str, str]:
    """The error code and message of a refusal, as far as it has them.

    OpenAI nests both in "error"; vLLM and FastAPI have had them at the top, or under "detail".
    """
    error = reply.get("error") or reply
    if not isinstance(error, dict):
        error = {"message": error}
    code = error.get("code") or error.get("type") or ""
    message = error.get("message") or error.get("detail") or ""
    return plain(str(code), 80), plain(str(message), 300)


def same_model(asked: str, echoed: str) -> bool:
    """Whether two names can be one model: `gpt-4.1` answers as `gpt-4.1-2025-04-14`.

    >>> same_model("org/Small-7B", "small-7b"), same_model("gpt-4.1", "llama-3")
    (True, False)
    """
    one, other = (name.rstrip("/").rpartition("/")[2].casefold() for name in (asked, echoed))
    return one.startswith(other) or other.startswith(one)


def _text(choice: dict[str, Any], chat: bool) -> str:
    """What one choice says; null counts as "" and anything but a text is malformed."""
    holder = choice.get("message") if chat else choice
    if not isinstance(holder, dict):
        raise NotACompletion("a choice without a message")
    text = holder.get("content" if chat else "text")
    if text is None:
        return ""
    if not isinstance(text, str):
        raise NotACompletion(f"the text is of type {type(text).__name__}")
    return text if text.isascii() else LONE_SURROGATE.sub("\ufffd", text)


def _finish(choices: list[dict[str, Any]]) -> str | None:
    """The finish reason; of several samples, one that is not "stop", so that no cut is hidden."""
    reasons = [r for choice in choices if isinstance(r := choice.get("finish_reason"), str)]
    return next((reason for reason in reasons if reason != "stop"), "stop" if reasons else None)


def _silence(choice: dict[str, Any], finish: str | None, chat: bool) -> tuple[str, str]:
    """Why there is no text: fault and detail."""
    refusal = choice["message"].get("refusal") if chat else None
    if isinstance(refusal, str) and refusal:
        return "refused", plain(refusal, 200) or "a refusal"
    if finish == "content_filter":
        return "refused", "stopped by the server's content filter"
    if finish == "length":
        return "truncated", "the token limit was reached before any text"
    return "empty", f"no text (finish reason {finish})"


def _usage(usage: object) -> dict[str, int]:
    if not isinstance(usage, dict):
        return {}
    names = ("prompt_tokens", "completion_tokens")
    return {name: n for name in names if type(n := usage.get(name)) is int and n >= 0}


def option_logprobs(choice: dict[str, Any], options: tuple[str, ...]) -> dict[str, float] | None:
    """Each option's log-probability as the first token; None where none of them is listed.

    Tokens that differ in case and surrounding spaces only are one option: their probabilities
    add up. An option that is not listed gets an upper bound: no token outside the list is likelier
    than the last one in it, nor than all that the list leaves over.
    """
    listed, own = _first_token(choice.get("logprobs"))
    if not listed:
        return None
    wanted = {option.strip().casefold(): option for option in options}
    mass: dict[str, float] = {}
    for token, logprob in [*listed, *own]:
        option = wanted.get(token.strip().casefold())
        if option is not None:
            mass[option] = mass.get(option, 0.0) + math.exp(logprob)
    mass = {option: p for option, p in mass.items() if p > 0}
    if not mass:
        return None
    # Float32 servers round: what is left over is known to about 1e-6 only.
    left = max(1e-6, 1 - math.fsum(math.exp(logprob) for _, logprob in [*listed, *own]))
    bound = min(min(logprob for _, logprob in listed), math.log(left))
    return {
        option: min(0.0, math.log(mass[option])) if option in mass else bound for option in options
    }


Listed = list[tuple[str, float]]


def _first_token(logprobs: object) -> tuple[Listed, Listed]:
    """The alternatives for the first generated token, and that token where it is not among them.

    Chat lists objects, the older endpoint a mapping; some servers answer both in the chat shape.
    """
    if not isinstance(logprobs, dict):
        return [], []
    if isinstance(content := logprobs.get("content"), list) and content:
        first = content[0] if isinstance(content[0], dict) else {}
        tops = first.get("top_logprobs")
        listed = [_entry(entry) for entry in tops] if isinstance(tops, list) else []
        own = [_entry(first)] if "logprob" in first else []
    else:
        tops, tokens = logprobs.get("top_logprobs"), logprobs.get("tokens")
        if not (isinstance(tops, list) and tops and isinstance(tops[0], dict)):
            return [], []
        listed = [_pair(token, logprob) for token, logprob in tops[0].items()]
        values = logprobs.get("token_logprobs")
        known = isinstance(tokens, list) and isinstance(values, list) and tokens and values
        own = [_pair(tokens[0], values[0])] if known else []
    names = {token for token, _ in listed}
    return listed, [pair for pair in own if pair[0] not in names]


def _entry(entry: object) -> tuple[str, float]:
    if not isinstance(entry, dict):
        raise NotACompletion("a log-probability is not an object")
    return _pair(entry.get("token"), entry.get("logprob"))


def _pair(token: object, logprob: object) -> tuple[str, float]:
    number = isinstance(logprob, int | float) and not isinstance(logprob, bool)
    if not isinstance(token, str) or not number or not logprob <= 1e-3:
        raise NotACompletion("a log-probability is not a number <= 0")
    return token, float(min(0, max(logprob, IMPOSSIBLE)))
