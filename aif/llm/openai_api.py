"""Any OpenAI-compatible server as an LLM, with hundreds of requests in flight in one thread.

    [judge]
    model = "openai:gpt-4.1-mini"
    base_url = "http://localhost:8000/v1"     # none: api.openai.com

The retries here are the only ones (the SDK's are off), so `attempts` is the real number.
"""

from __future__ import annotations

import asyncio
import base64
import os
import socket
from collections.abc import Awaitable, Iterable, Iterator
from dataclasses import dataclass, replace
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit, urlunsplit

import aiohttp
import httpx2
import openai

from aif.config.settings import LLMSettings, without_secrets
from aif.errors import InputError, JudgeStopped, shown
from aif.llm import LLM, Answer, Ask, openai_format
from aif.llm.pool import WorkerPool
from aif.llm.rate_limit import InFlight, wait_s
from aif.llm.usage import USAGE

PLACEHOLDER = "none"  # a local server wants some key, any key
RETRIED = {408, 409, 425, 429}  # and every 5xx
SLOW_DOWN = {429, 503, 529}  # 529: "overloaded", outside OpenAI
NO_QUOTA = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
STRUCTURED = ("response_format", "json_schema", "structured", "guided", "grammar")
CONNECT_S = 30.0

# uvicorn (so vLLM too) closes an idle connection after 5 s; a request sent just then is lost.
KEEPALIVE_S = 4.0


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed attempt that may be retried: the fault of the answer if it was the last one."""

    fault: str
    detail: str
    headers: dict[str, str] | httpx2.Headers
    slow_down: bool = False
    unmetered: bool = False  # whether it may have been paid for


class NotFound(JudgeStopped):
    """The server has nothing at this path."""


class ApiLLM(LLM):
    """The model `name` behind `settings.base_url`."""

    def __init__(self, settings: LLMSettings, name: str):
        self._settings = settings
        self._name = name
        self._address = Address.of(settings)
        self._loop = asyncio.new_event_loop()
        self._client = self._connect()

    def _connect(self) -> openai.AsyncOpenAI:
        limits = httpx2.Limits(
            max_connections=self._settings.concurrency, keepalive_expiry=KEEPALIVE_S
        )
        # No timeout between two reads: the deadline of the whole attempt covers them.
        timeout = httpx2.Timeout(None, connect=min(CONNECT_S, self._settings.timeout_s))
        return openai.AsyncOpenAI(
            api_key=self._address.key,
            base_url=self._address.url,
            default_headers=self._address.headers,
            default_query=self._address.query,
            max_retries=0,
            timeout=timeout,
            http_client=openai.DefaultAioHttpClient(limits=limits, timeout=timeout),
        )

    def answer(self, asks: Iterable[Ask]) -> Iterator[Answer]:
        """One answer for every ask, as they come in; raises `JudgeStopped` if no other can come.

        Before that, requests under way get a few seconds, and their answers are yielded.
        """
        limit = InFlight(self._settings.concurrency)
        yield from WorkerPool(self._loop, asks, self._answer_one, limit).answers()

    def count_tokens(self, asks: Iterable[Ask]) -> tuple[int, bool]:
        """An estimate: four bytes of UTF-8 a token, and four tokens around each message."""
        total = 0
        for ask in asks:
            total += sum(len(text.encode("utf-8", "replace")) + 3 for text in ask.texts) // 4
            total += 4 * len(ask.messages or ())
        return total, False

    def close(self) -> None:
        """Close the connections; a second call does nothing."""
        if not self._loop.is_closed():
            self._loop.run_until_complete(self._client.close())
            self._loop.close()

    def _body(self, ask: Ask) -> bytes:
        body = openai_format.body(ask, self._name, logprobs=self._settings.logprobs)
        return openai_format.encode(body)

    async def _answer_one(self, ask: Ask, limit: InFlight) -> Answer:
        """Ask until there is an answer or no attempt is left; gives its place up while it waits."""
        sent = self._body(ask)
        unmetered = 0
        for failures in range(1, self._settings.attempts + 1):
            outcome = await self._attempt(ask, sent)
            unmetered += outcome.unmetered
            if isinstance(outcome, Answer):
                limit.count(refused=False)
                return replace(outcome, unmetered=unmetered)
            limit.count(refused=outcome.slow_down)
            if failures == self._settings.attempts or (outcome.unmetered and not ask.may_retry()):
                break
            limit.leave()
            await asyncio.sleep(wait_s(outcome.headers, failures, self._settings.max_wait_s))
            await limit.enter(again=True)
        tries = f" ({failures} attempts)" if failures > 1 else ""
        detail = outcome.detail + tries
        return Answer(ask.key, fault=outcome.fault, detail=detail, unmetered=unmetered)

    async def _attempt(self, ask: Ask, sent: bytes) -> Answer | Failure:
        """One request, within the deadline."""
        # `post` returns the response unread. The SDK's typed methods turn every body into a str or
        # a half-empty object without raising, and take twice the time.
        request = self._client.post(openai_format.path(ask), cast_to=httpx2.Response, content=sent)
        response = await self._sent(request, self._settings.timeout_s)
        if isinstance(response, Failure):
            return response
        if not response.is_success:
            return self._refused(ask, response)
        return self._answered(ask, response.content)

    async def _sent(
        self, request: Awaitable[httpx2.Response], seconds: float
    ) -> httpx2.Response | Failure:
        """The whole response, whatever its status."""
        try:
            async with asyncio.timeout(seconds):
                return await request
        except TimeoutError:
            return Failure("timeout", f"no answer within {seconds:g} s", {}, unmetered=True)
        except openai.APIStatusError as error:
            # Not raised: this error may echo a key, and a traceback would show it.
            return error.response
        except (openai.APIConnectionError, httpx2.HTTPError, aiohttp.ClientError, OSError) as error:
            return self._broken(error)

    def _answered(self, ask: Ask, raw: bytes) -> Answer:
        """The answer in the body of a success, without secrets."""
        answer = self._read(ask, raw)
        answer = replace(answer, unmetered=int(len(answer.usage) < len(USAGE)))
        if answer.fault is None:
            return answer
        # The detail quotes the body, cut short. Redacting that could leave half a key.
        redacted = self._read(ask, self._address.redact(raw))
        return replace(answer, detail=redacted.detail or answer.fault)

    def _read(self, ask: Ask, raw: bytes) -> Answer:
        model = self._name if self._settings.check_model else None
        return openai_format.read(ask, raw, model=model, logprobs=self._settings.logprobs)

    def _broken(self, error: Exception) -> Failure:
        """A failure without a whole response. Its cause is the last of the chain of exceptions: the
        aiohttp transport and the SDK turn a refused connection into a timeout."""
        while error.__cause__ is not None:
            error = error.__cause__
        fault = "timeout" if isinstance(error, TimeoutError) else "backend"
        detail = f"{type(error).__name__}: {error}".removesuffix(": ").encode("utf-8", "replace")
        detail = openai_format.plain(self._address.redact(detail).decode(), 200)
        arrived = not isinstance(error, ConnectionRefusedError | socket.gaierror)
        return Failure(fault, detail, {}, unmetered=arrived)

    def _refused(self, ask: Ask, response: httpx2.Response) -> Answer | Failure:
        """What an error status means for this ask; raises JudgeStopped if it ends all of them."""
        status = response.status_code
        code, message = _reason(response.content)
        words = f"{code} {message}".casefold()
        reason = " ".join(filter(None, _reason(self._address.redact(response.content))))
        detail = f"HTTP {status}: {reason}".removesuffix(": ")
        if status == 402 or (status == 429 and (code in NO_QUOTA or "billing" in words)):
            raise self.stopped("no quota left", detail)
        if status in RETRIED or status >= 500:
            fault = "rate_limited" if status == 429 else "backend"
            return Failure(fault, detail, response.headers, status in SLOW_DOWN)
        if "content_filter" in words or "content_policy" in words or "moderation" in words:
            return Answer(ask.key, fault="refused", detail=detail)
        if status in (401, 403):
            raise self.stopped(f"the key in {self._settings.api_key_env} was refused", detail)
        if status in (404, 405):
            raise NotFound(str(self.stopped("no such model or path", detail)))
        if ask.schema and status in (400, 422) and any(word in words for word in STRUCTURED):
            raise self.stopped("it has no structured output, unset judge.structured", detail)
        if "context_length" in words or "context length" in words or status == 413:
            return Answer(ask.key, fault="too_long", detail=detail)
        return Answer(ask.key, fault="rejected", detail=detail)

    def stopped(self, why: str, detail: str) -> JudgeStopped:
        """The error that names the model, its address and the reason."""
        return JudgeStopped(f"{self._settings.model} at {self._address.shown}: {why} ({detail})")


@dataclass(frozen=True, slots=True)
class Address:
    """A server's URL and the key for it; the one place that holds secrets."""

    url: str | None
    key: str
    headers: dict[str, str]
    query: dict[str, str]
    shown: str  # the URL as a message may have it
    secrets: tuple[str, ...]

    @classmethod
    def of(cls, settings: LLMSettings) -> Address:
        """From settings and the environment; a user and password in the URL become a header."""
        key = os.environ.get(settings.api_key_env, "").strip()
        if not key.isascii() or not key.isprintable():
            raise InputError(
                "environment", settings.api_key_env, got="odd characters", expected="plain ASCII"
            )
        if settings.base_url is None:
            if not key:
                raise InputError(
                    "environment",
                    settings.api_key_env,
                    got="nothing",
                    expected="the key for api.openai.com (or set base_url for another server)",
                )
            return cls(None, key, {}, {}, "api.openai.com", (key,))
        parts = _http_url(settings.base_url)
        query = dict(parse_qsl(parts.query))
        userinfo, _, host = parts.netloc.rpartition("@")
        url = urlunsplit((parts.scheme, host, parts.path, "", ""))
        basic = base64.b64encode(unquote(userinfo).encode()).decode()
        headers = {"Authorization": f"Basic {basic}"} if userinfo else {}
        secrets = [key, basic, unquote(userinfo), unquote(parts.password or ""), *query.values()]
        shown_url = without_secrets(settings.base_url) or ""
        return cls(url, key or PLACEHOLDER, headers, query, shown_url, tuple(filter(None, secrets)))

    def redact(self, text: bytes) -> bytes:
        """The text with every secret in it replaced by ***."""
        for secret in self.secrets:
            text = text.replace(secret.encode(), b"***")
        return text


def _http_url(text: str) -> SplitResult:
    try:
        parts = urlsplit(text)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:  # a port over 65535, half an IPv6 address
        pass
    tail = text.rpartition("@")[2].partition("?")[0]  # what stands before and after may be secret
    expected = "http://host:port/v1 or https://..."
    raise InputError("settings", "base_url", got=shown(tail), expected=expected)


def _reason(raw: bytes) -> tuple[str, str]:
    """The code and message in the body of a refusal, or the body's first words."""
    try:
        return openai_format.error_in(openai_format.parse(raw))
    except openai_format.NotACompletion:
        return "", openai_format.start_of(raw)
