"""One request to the Batch API at a time: upload and download files, create and find batches.

`aif.llm.batch_api` decides what goes into a batch and when to ask again.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import httpx2

from aif.errors import Interrupted, JudgeStopped
from aif.llm import Answer, Ask, openai_format
from aif.llm.event_loop import Turns
from aif.llm.openai_api import ApiLLM, Failure, NotFound
from aif.llm.rate_limit import wait_s
from aif.llm.submissions import Submission

T = TypeVar("T")

MAX_REQUESTS = 50_000  # of a batch, and
MAX_BYTES = 200_000_000  # of its file, as the guide has them
SLOWEST = 100_000  # bytes per second: the slowest transfer of a file
SLICE_S = 0.1  # how soon `sleep` sees a signal


class BatchRefused(JudgeStopped):
    """The server does not accept these requests as a batch."""


@dataclass(slots=True)
class Requests:
    """The file of a batch to be created."""

    endpoint: str = ""
    keys: list[str] = field(default_factory=list)
    content: bytearray = field(default_factory=bytearray)


class BatchClient(ApiLLM):
    """The Batch API of `settings.base_url`, for the model `name`.

    Every method raises JudgeStopped (NotFound on a 404) when the server refuses or fails each time,
    and Interrupted when `stopping` becomes true while it waits.
    """

    stopping: Callable[[], bool] = staticmethod(lambda: False)

    @cached_property
    def _files(self) -> Any:
        return self._client.files.with_raw_response

    @cached_property
    def _batches(self) -> Any:
        return self._client.batches.with_raw_response

    def request(
        self,
        make: Callable[[], Awaitable[Any]],
        seconds: float = 0.0,
        read: Callable[[bytes], T] = openai_format.parse,
    ) -> T:
        """What `read` gets from the body of the response; a failed request is made again."""
        for failures in range(1, self._settings.attempts + 1):
            outcome = self.once(make, seconds, read)
            if not isinstance(outcome, Failure):
                return outcome
            if failures < self._settings.attempts:
                self.sleep(wait_s(outcome.headers, failures, self._settings.max_wait_s))
        tries = f"{self._settings.attempts} attempts"
        raise self.stopped(f"the server failed, {tries}; the same command resumes", outcome.detail)

    def once(
        self,
        make: Callable[[], Awaitable[Any]],
        seconds: float = 0.0,
        read: Callable[[bytes], T] = openai_format.parse,
    ) -> T | Failure:
        """As `request`, but made once; it may take `seconds` more than a call to a model."""
        response = self._run(self._sent(_plain(make()), self._settings.timeout_s + seconds))
        if isinstance(response, Failure):
            return response
        if response.is_success:
            try:
                return read(response.content)
            except openai_format.NotACompletion:
                start = openai_format.start_of(self._address.redact(response.content))
                return Failure("malformed", f"no JSON object: {start}", {})
        refusal = self._refused(Ask(""), response)
        if isinstance(refusal, Failure):
            return refusal
        raise self.stopped("the server refused", refusal.detail)

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
        """Wait; raises Interrupted as soon as `stopping` is true."""
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
        """Asks as files of requests, each as large as the API allows."""
        file = Requests()
        for ask in asks:
            endpoint = "/v1" + openai_format.path(ask)
            row = {"custom_id": ask.key, "method": "POST", "url": endpoint}
            line = json.dumps(row).encode()[:-1] + b', "body": ' + self._body(ask) + b"}\n"
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
        file = ("requests.jsonl", content, "application/jsonl")
        seconds = len(content) / SLOWEST
        try:
            reply = self.request(lambda: self._files.create(file=file, purpose="batch"), seconds)
        except NotFound as error:
            raise JudgeStopped(f"{error}; is there a Batch API?") from None
        return self._id_in(reply)

    def download(self, file: str) -> bytes:
        """The content of a file, b"" if the server no longer has it."""
        try:
            return self.request(lambda: self._files.content(file), MAX_BYTES / SLOWEST, _rows)
        except NotFound:
            return b""

    def create(self, submission: Submission) -> str:
        """Create its batch, or find the one that was created; returns the batch's id.

        Raises BatchRefused if there is none and will be none.
        """

        def make() -> Awaitable[Any]:
            return self._batches.create(
                completion_window="24h",
                endpoint=submission.endpoint,
                input_file_id=submission.file,
                metadata={"aif": submission.tag},
            )

        for failures in range(1, self._settings.attempts + 1):
            try:
                outcome = self.once(make)
            except JudgeStopped as error:
                raise BatchRefused(str(error)) from None
            if not isinstance(outcome, Failure):
                return self._id_in(outcome)
            self.sleep(wait_s(outcome.headers, failures, self._settings.max_wait_s))
            # It may be that only the response was lost.
            if batch := self.find({submission.tag}).get(submission.tag):
                return batch
        raise self.stopped("no batch was created; the same command resumes", outcome.detail)

    def find(self, tags: set[str]) -> dict[str, str]:
        """The ids of the server's batches with these tags, by tag."""
        batch_of: dict[str, str] = {}
        after: dict[str, str] = {}
        while True:
            page = self.request(partial(self._batches.list, limit=100, **after))
            listed = [batch for batch in page.get("data") or [] if isinstance(batch, dict)]
            for batch in listed:
                tag = (batch.get("metadata") or {}).get("aif")
                if tag in tags:
                    batch_of[tag] = self._id_in(batch)
            if not listed or not page.get("has_more") or batch_of.keys() == tags:
                return batch_of
            after = {"after": self._id_in(listed[-1])}

    def look_once(self, submission: Submission) -> dict[str, Any] | Failure:
        """The server's record of a batch, or why this one request failed."""
        return self.once(lambda: self._batches.retrieve(submission.batch))

    def look(self, submission: Submission) -> dict[str, Any]:
        """The server's record of a batch."""
        return self.request(lambda: self._batches.retrieve(submission.batch))

    def cancel(self, submission: Submission) -> dict[str, Any]:
        """Have the server stop a batch; the answers that it has stay."""
        return self.request(lambda: self._batches.cancel(submission.batch))

    def _id_in(self, reply: dict[str, Any]) -> str:
        if isinstance(reply.get("id"), str) and reply["id"]:
            return reply["id"]
        start = openai_format.start_of(json.dumps(reply).encode())
        raise self.stopped("an answer without an id", start)

    def errors(self, batch: dict[str, Any]) -> tuple[set[str], str]:
        """The error codes of a whole batch, and the first error as a message."""
        data = (batch.get("errors") or {}).get("data") or []
        read = [openai_format.error_in(error) for error in data if isinstance(error, dict)]
        if not read:
            return set(), "no reason given"
        line = data[0].get("line")
        where = f"line {line}: " if line is not None else ""
        more = f" and {len(read) - 1:,} more" if len(read) > 1 else ""
        message = f"{where}{' '.join(filter(None, read[0]))}{more}"
        return {code for code, _ in read}, self._address.redact(message.encode()).decode()

    def outcome(self, ask: Ask, line: bytes) -> Answer | Failure:
        """The outcome of an ask, from its row of an output or error file."""
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


def _rows(content: bytes) -> bytes:
    """The content of a file; raises NotACompletion if it is not one, but a proxy's page."""
    if content:
        openai_format.parse(content.partition(b"\n")[0])
    return content


async def _plain(request: Awaitable[Any]) -> httpx2.Response:
    """The HTTP response of a request by `with_raw_response`."""
    return (await request).http_response
