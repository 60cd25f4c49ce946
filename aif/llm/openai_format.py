"""The OpenAI wire format: an `Ask` to a request body, a response body to an `Answer`.

Nothing here opens a connection, so the Batch API uses it too. Reading is strict: a body that is
not a completion becomes an `Answer` with a fault, never an exception and never a text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from aif.llm import Answer, Ask
from aif.llm.option_logprobs import IMPOSSIBLE, Listed, TokenLogprobs, read_texts
from aif.llm.usage import USAGE
from aif.store import jsonl
from aif.store.records import LONE_SURROGATE

# The most alternatives that an endpoint lists: chat 20 by OpenAI's reference and vLLM's default;
# the older one 5 by OpenAI's (vLLM would take 20, but other servers refuse more than 5).
CHAT_TOP, TEXT_TOP = 20, 5
REASONED_TOP = 5  # for each token of long reasons, of which one place has the two options


class NotACompletion(ValueError):
    """A body is not a completion; says why in a few words."""


def path(ask: Ask) -> str:
    """The endpoint, below the base URL."""
    return "/completions" if ask.messages is None else "/chat/completions"


def body(ask: Ask, model: str, *, logprobs: bool) -> dict[str, Any]:
    """The request body; it wants log-probabilities if the ask has options to read."""
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
            top = REASONED_TOP if ask.lead else CHAT_TOP
            sent |= {"logprobs": True, "top_logprobs": top}
    if ask.schema:
        schema = {"name": "verdict", "strict": True, "schema": ask.schema}
        sent["response_format"] = {"type": "json_schema", "json_schema": schema}
    return sent


def encode(sent: dict[str, Any]) -> bytes:
    """The body as UTF-8 JSON; a lone surrogate, which UTF-8 cannot carry, becomes U+FFFD."""
    text = json.dumps(sent, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return LONE_SURROGATE.sub("\ufffd", text).encode()


def read(ask: Ask, raw: bytes, *, model: str | None, logprobs: bool) -> Answer:
    """The answer in a response body; with `model`, an answer of another model is a fault."""
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
    options, ends = None, ()
    if ask.options and logprobs:
        options, ends = read_texts(ask, texts, [_tokens(c.get("logprobs")) for c in choices])
    finish = _finish(choices)
    usage = _usage(reply.get("usage"))
    if options is None and not any(text.strip() for text in texts):
        fault, detail = _silence(choices[0], finish, chat)
        return Answer(ask.key, finish=finish, fault=fault, detail=detail, usage=usage)
    # Not every server obeys `stop`.
    return Answer(ask.key, texts, finish, options, usage=usage, ends=ends).cut(ask)


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
    """A server's text for a message: one line, no control characters, no lone surrogates."""
    printable = "".join(char if char.isprintable() else " " for char in text[: 2 * limit])
    return " ".join(printable.split())[:limit]


def start_of(raw: bytes) -> str:
    """The first characters of a body, for a message."""
    return plain(raw[:400].decode("utf-8", "replace"), 100)


def error_in(reply: dict[str, Any]) -> tuple[str, str]:
    """The error code and message of a refusal, "" for what it lacks.

    OpenAI nests both in "error"; vLLM and FastAPI had them at the top, or under "detail".
    """
    error = reply.get("error") or reply
    if not isinstance(error, dict):
        error = {"message": error}
    code = error.get("code") or error.get("type") or ""
    message = error.get("message") or error.get("detail") or ""
    return plain(str(code), 80), plain(str(message), 300)


def same_model(requested: str, echoed: str) -> bool:
    """Whether two names can be one model: `gpt-4.1` answers as `gpt-4.1-2025-04-14`.

    >>> same_model("org/Small-7B", "small-7b"), same_model("gpt-4.1", "llama-3")
    (True, False)
    """
    one, other = (name.rstrip("/").rpartition("/")[2].casefold() for name in (requested, echoed))
    return one.startswith(other) or other.startswith(one)


def _text(choice: dict[str, Any], chat: bool) -> str:
    """The text of one choice; null counts as "" and anything but a text is malformed."""
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
    """The finish reason; of several samples the first that is not "stop", so no cut is hidden."""
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
    return {name: n for name in USAGE if type(n := usage.get(name)) is int and n >= 0}


def _tokens(logprobs: object) -> TokenLogprobs:
    """The generated tokens, each with the alternatives for it.

    Chat lists objects, the older endpoint mappings; some servers answer both in the chat shape.
    """
    if not isinstance(logprobs, dict):
        return TokenLogprobs([], lambda _: ([], []))
    if isinstance(content := logprobs.get("content"), list) and content:
        entries = [entry if isinstance(entry, dict) else {} for entry in content]
        return TokenLogprobs(
            _strings(e.get("token") for e in entries), lambda i: _of_chat(entries[i])
        )
    tokens, tops = logprobs.get("tokens"), logprobs.get("top_logprobs")
    texts = _strings(tokens) if isinstance(tokens, list) else []
    values = logprobs.get("token_logprobs")

    def at(i: int) -> tuple[Listed, Listed]:
        if not (isinstance(tops, list) and i < len(tops) and isinstance(tops[i], dict)):
            return [], []
        has_own = isinstance(values, list) and i < min(len(texts), len(values))
        own = [_pair(tokens[i], values[i])] if has_own else []
        return _apart([_pair(token, logprob) for token, logprob in tops[i].items()], own)

    return TokenLogprobs(texts, at)


def _of_chat(entry: dict[str, Any]) -> tuple[Listed, Listed]:
    tops = entry.get("top_logprobs")
    listed = [_entry(one) for one in tops] if isinstance(tops, list) else []
    return _apart(listed, [_entry(entry)] if "logprob" in entry else [])


def _apart(listed: Listed, own: Listed) -> tuple[Listed, Listed]:
    """`own` without what is in `listed`."""
    names = {token for token, _ in listed}
    return listed, [pair for pair in own if pair[0] not in names]


def _strings(tokens: Iterable[object]) -> list[str]:
    return [token if isinstance(token, str) else "" for token in tokens]


def _entry(entry: object) -> tuple[str, float]:
    if not isinstance(entry, dict):
        raise NotACompletion("a log-probability is not an object")
    return _pair(entry.get("token"), entry.get("logprob"))


def _pair(token: object, logprob: object) -> tuple[str, float]:
    number = isinstance(logprob, int | float) and not isinstance(logprob, bool)
    if not isinstance(token, str) or not number or not logprob <= 1e-3:
        raise NotACompletion("a log-probability is not a number <= 0")
    return token, float(min(0, max(logprob, IMPOSSIBLE)))
