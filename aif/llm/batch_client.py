"""One request to the Batch API at a time: files up and down, batches made, found and looked at.

What a batch is for and when to ask again is `aif.llm.batch_api`'s to say.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import httpx2

from aif.errors import Interrupted, JudgeStopped
from aif.llm import Answer, Ask, openai_format
from aif.llm.event_loop import Turns
from aif.llm.openai_api import ApiLLM, Failure
from aif.llm.rate_limit import wait_s
from aif.llm.submissions import Submission

T = TypeVar("T")

MAX_REQUESTS = 50_000  # of a batch, and
MAX_BYTES = 200_000_000  # of its file, as the guide has them
SLOWEST = 100_000  # bytes a second at which a file may go over the wire
SLICE_S = 0.1  # how soon a signal ends a wait


class Missing(JudgeStopped):
    """The server knows no such thing."""


class Refused(JudgeStopped):
    """The server will not make a batch of this."""


@dataclass(slots=True)
class Requests:
    """The content of a file that is to be a batch."""

    endpoint: str = ""
    keys: list[str] = field(default_factory=list)
    content: bytearray = field(default_factory=bytearray)


class BatchClient(ApiLLM):
    """The Batch API of `settings.base_url`, for the model `name`.

    Every method raises JudgeStopped when the server refuses or fails each time, and Interrupted
    when `stopping` turns true while it waits.
    """

    stopping: Callable[[], bool] = staticmethod(lambda: False)

    def stopped(self, why: str, detail: str) -> JudgeStopped:
        """Why this cannot go on, with the model and its address."""
        return self._stopped(why, detail)

    def request(self, make: Callable[[], Awaitable[Any]], seconds: float = 0.0) -> dict[str, Any]:
        """The JSON object that the server answers; JudgeStopped when there is none to be had."""
        return openai_format.parse(self._patiently(make, seconds, openai_format.parse))

    def download(self, file: str) -> bytes:
        """The content of a file, b"" where the server has it no more."""
        files = self._client.files.with_raw_response
        try:
            return self._patiently(lambda: files.content(file), MAX_BYTES / SLOWEST, _first_row)
        except Missing:
            return b""

    def _patiently(
        self, make: Callable[[], Awaitable[Any]], seconds: float, check: Callable[[bytes], object]
    ) -> bytes:
        for failures in range(1, self._settings.attempts + 1):
            found = self.once(make, seconds, check)
            if isinstance(found, bytes):
                return found
            if failures < self._settings.attempts:
                self.sleep(wait_s(found.headers, failures, self._settings.max_wait_s))
        tries = f"{self._settings.attempts} attempts"
        raise self._stopped(f"the server failed, {tries}; the same command resumes", found.detail)

    def once(
        self,
        make: Callable[[], Awaitable[Any]],
        seconds: float = 0.0,
        check: Callable[[bytes], object] = openai_format.parse,
    ) -> bytes | Failure:
        """The body of one request that may take `seconds` more than a call to a model."""
        response = self._run(self._sent(_plain(make()), self._settings.timeout_s + seconds))
        if isinstance(response, Failure):
            return response
        if response.is_success:
            try:
                check(response.content)
            except openai_format.NotACompletion:
                said = openai_format.start_of(self._address.redact(response.content))
                return Failure("malformed", f"no JSON object: {said}", {})
            return response.content
        if response.status_code in (404, 405):
            said = openai_format.start_of(self._address.redact(response.content))
            detail = f"HTTP {response.status_code}: {said}"
            raise Missing(str(self._stopped("no such thing", detail)))
        refused = self._refused(Ask(""), response)
        if isinstance(refused, Failure):
            return refused
        raise self._stopped("the server refused", refused.detail)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        task = self._loop.create_task(work)
        try:
            with Turns(self._loop) as turns:
                task.add_done_callback(lambda _: turns.wake())
                while not task.done():
                    turns.run()
                    turns.deliver()
            return task.result()
        finally:
            task.cancel()
            self._loop.run_until_complete(asyncio.wait({task}))

    def sleep(self, seconds: float) -> None:
        """Wait; raises Interrupted as soon as a signal asks to end."""
        until = time.monotonic() + seconds
        while True:
            if self.stopping():
                raise Interrupted("interrupted; the same command resumes")
            left = until - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(SLICE_S, left))

    # ---- files and batches

    def requests(self, asks: Iterable[Ask]) -> Iterator[Requests]:
        """Asks as files of requests, each as full as it may be."""
        file = Requests()
        for ask in asks:
            endpoint = "/v1" + openai_format.path(ask)
            sent = openai_format.encode(
                openai_format.body(ask, self._name, logprobs=self._settings.logprobs)
            )
            row = {"custom_id": ask.key, "method": "POST", "url": endpoint}
            line = json.dumps(row).encode()[:-1] + b', "body": ' + sent + b"}\n"
            full = len(file.keys) == MAX_REQUESTS or len(file.content) + len(line) > MAX_BYTES
            if file.keys and (full or endpoint != file.endpoint):
                yield file
                file = Requests()
            file.endpoint = endpoint
            file.keys.append(ask.key)
            file.content += line
        if file.keys:
            yield file

    def upload(self, content: bytes) -> str:
        """Send a file of requests; returns its id."""
        files = self._client.files.with_raw_response
        named = ("requests.jsonl", content, "application/jsonl")
        seconds = len(content) / SLOWEST
        try:
            found = self.request(lambda: files.create(file=named, purpose="batch"), seconds)
        except Missing as error:
            raise JudgeStopped(f"{error}; is there a Batch API?") from None
        return self._id_in(found)

    def create(self, submission: Submission) -> str:
        """Have a batch made of it, or find the one that was; returns its id.

        Raises Refused where there is none and will be none.
        """
        batches = self._client.batches.with_raw_response

        def make() -> Awaitable[Any]:
            return batches.create(
                completion_window="24h",
                endpoint=submission.endpoint,
                input_file_id=submission.file,
                metadata={"aif": submission.tag},
            )

        for failures in range(1, self._settings.attempts + 1):
            try:
                outcome = self.once(make)
            except JudgeStopped as error:
                raise Refused(str(error)) from None
            if isinstance(outcome, bytes):
                return self._id_in(openai_format.parse(outcome))
            self.sleep(wait_s(outcome.headers, failures, self._settings.max_wait_s))
            # Only the answer may have been lost.
            if batch := self.find({submission.tag}).get(submission.tag):
                return batch
        raise self._stopped("no batch was created; the same command resumes", outcome.detail)

    def find(self, tags: set[str]) -> dict[str, str]:
        """Batch ids by tag, of the batches that the server has."""
        batches = self._client.batches.with_raw_response
        found: dict[str, str] = {}
        after: dict[str, str] = {}
        while True:
            page = self.request(partial(batches.list, limit=100, **after))
            listed = [batch for batch in page.get("data") or [] if isinstance(batch, dict)]
            for batch in listed:
                tag = (batch.get("metadata") or {}).get("aif")
                if tag in tags:
                    found[tag] = self._id_in(batch)
            if not listed or not page.get("has_more") or found.keys() == tags:
                return found
            after = {"after": self._id_in(listed[-1])}

    def look_once(self, submission: Submission) -> dict[str, Any] | Failure:
        """A batch as it now is, or why this one look did not show it."""
        batches = self._client.batches.with_raw_response
        found = self.once(lambda: batches.retrieve(submission.batch))
        return found if isinstance(found, Failure) else openai_format.parse(found)

    def look(self, submission: Submission) -> dict[str, Any]:
        """A batch as it now is."""
        batches = self._client.batches.with_raw_response
        return self.request(lambda: batches.retrieve(submission.batch))

    def cancel(self, submission: Submission) -> dict[str, Any]:
        """Have the server stop a batch; what it has answered stays."""
        batches = self._client.batches.with_raw_response
        return self.request(lambda: batches.cancel(submission.batch))

    def _id_in(self, found: dict[str, Any]) -> str:
        if isinstance(found.get("id"), str) and found["id"]:
            return found["id"]
        raise self._stopped(
            "an answer without an id", openai_format.start_of(json.dumps(found).encode())
        )

    def errors(self, seen: dict[str, Any]) -> tuple[set[str], str]:
        """Codes of what is wrong with a whole batch, and the first of it in words."""
        data = (seen.get("errors") or {}).get("data") or []
        read = [openai_format.error_in(error) for error in data if isinstance(error, dict)]
        if not read:
            return set(), "no reason given"
        line = data[0].get("line")
        where = f"line {line}: " if line is not None else ""
        more = f" and {len(read) - 1:,} more" if len(read) > 1 else ""
        said = f"{where}{' '.join(filter(None, read[0]))}{more}"
        return {code for code, _ in read}, self._address.redact(said.encode()).decode()

    def outcome(self, ask: Ask, line: bytes) -> Answer | Failure:
        """What a row of an output or error file says about its ask."""
        row = openai_format.parse(line)
        response = row.get("response")
        if isinstance(response, dict) and type(status := response.get("status_code")) is int:
            try:
                body = json.dumps(response.get("body")).encode()
            except RecursionError:
                return Answer(ask.key, fault="malformed", detail="nested too deeply")
            if status == 200:
                return self._answered(ask, body)
            return self._refused(ask, httpx2.Response(status, content=body))
        code, message = openai_format.error_in(openai_format.parse(self._address.redact(line)))
        fault = "timeout" if code == "batch_expired" else "backend"
        return Failure(fault, f"{code}: {message}".strip(": ") or "a row without a response", {})


def _first_row(content: bytes) -> None:
    """Raise NotACompletion where this is not the file, but a proxy's page in its place."""
    if content:
        openai_format.parse(content.partition(b"\n")[0])


async def _plain(request: Awaitable[Any]) -> httpx2.Response:
    """The response in what `with_raw_response` gives."""
    return (await request).http_response
