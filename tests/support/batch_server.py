"""An emulated Batch API on 127.0.0.1, in a thread: files, batches, and what goes wrong with them.

    with batches() as server:
        server.next = [Plan(states=["in_progress", "expired"], answered=2)]
        ... server.base_url ... server.made ...

Every look at a batch takes it one state further. Answers are those of `server.completion`.
"""

from __future__ import annotations

import contextlib
import email
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.support.server import completion, hash_of

Row = dict[str, Any]
ENDED = ("completed", "expired", "cancelled")


@dataclass
class Plan:
    """What becomes of a batch: its states, then how many rows are answered, then their edit."""

    states: list[str] = field(
        default_factory=lambda: ["validating", "in_progress", "finalizing", "completed"]
    )
    answered: int | None = None  # the first so many; None: all
    rest: str | None = "batch_expired"  # code of the others in the error file; None: not in it
    edit: Callable[[list[Row], list[Row]], None] = lambda output, errors: None
    errors: list[Row] = field(default_factory=list)  # of the whole batch


class Batches:
    """The state of the server, for a test to set and read."""

    def __init__(self, port: int):
        self.root = f"http://127.0.0.1:{port}"
        self.base_url = f"{self.root}/v1"
        self.next: list[Plan] = []  # of the batches to come; then plain ones
        self.faults: dict[str, list[Any]] = {}  # "POST /batches" -> one each, see `act`
        self.files: dict[str, bytes] = {}
        self.made: dict[str, Row] = {}
        self.plans: dict[str, Plan] = {}
        self.calls: list[str] = []
        self.held = False  # no batch moves on
        self.keys: set[str] = set()  # as sent

    def rows(self, batch: str) -> list[Row]:
        """The requests of a batch."""
        content = self.files[self.made[batch]["input_file_id"]]
        return [json.loads(line) for line in content.split(b"\n") if line]

    @property
    def custom_ids(self) -> list[str]:
        """The custom_id of every request in every batch."""
        return [row["custom_id"] for batch in self.made for row in self.rows(batch)]

    def keep(self, content: bytes) -> str:
        name = f"file-{len(self.files)}"
        self.files[name] = content
        return name

    def make(self, request: Row) -> Row:
        name = f"batch_{len(self.made)}"
        self.plans[name] = self.next.pop(0) if self.next else Plan()
        self.made[name] = {"id": name, "object": "batch", "status": "validating", **request}
        self.made[name] |= {"output_file_id": None, "error_file_id": None, "errors": None}
        return self.made[name]

    def step(self, name: str) -> Row:
        batch, plan = self.made[name], self.plans[name]
        if self.held or batch["output_file_id"] or not plan.states:
            return batch
        batch["status"] = plan.states.pop(0)
        if batch["status"] == "failed":
            batch["errors"] = {"object": "list", "data": plan.errors}
        if batch["status"] in ENDED:
            self._end(batch, plan)
        return batch

    def _end(self, batch: Row, plan: Plan) -> None:
        rows = self.rows(batch["id"])
        count = len(rows) if plan.answered is None else plan.answered
        output = [_answered(row) for row in rows[:count]]
        errors = [_error(row, plan.rest) for row in rows[count:] if plan.rest]
        plan.edit(output, errors)
        for name, part in (("output_file_id", output), ("error_file_id", errors)):
            if part:
                lines = (row if isinstance(row, str) else json.dumps(row) for row in part)
                batch[name] = self.keep("".join(f"{line}\n" for line in lines).encode())


def _answered(row: Row) -> Row:
    prompt = json.dumps(row["body"]["messages"], ensure_ascii=False, sort_keys=True)
    body = completion(row["body"], prompt, hash_of(prompt))
    response = {"status_code": 200, "request_id": "r", "body": body}
    return {"id": "x", "custom_id": row["custom_id"], "response": response, "error": None}


def _error(row: Row, code: str) -> Row:
    error = {"code": code, "message": "This request was not executed."}
    return {"id": "x", "custom_id": row["custom_id"], "response": None, "error": error}


def refusal(row: Row, status: int, code: str, message: str) -> Row:
    """An output row turned into a row of the error file."""
    body = {"error": {"code": code, "message": message}}
    return row | {"response": {"status_code": status, "request_id": "r", "body": body}}


@contextlib.contextmanager
def batches() -> Iterator[Batches]:
    """A server for the length of a `with`."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    http.daemon_threads = True
    http.state = Batches(http.server_address[1])
    http.lock = threading.Lock()
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield http.state
    finally:
        http.shutdown()
        http.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_it("GET")

    def do_POST(self) -> None:
        self.handle_it("POST")

    def handle_it(self, method: str) -> None:
        state = self.server.state
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.removeprefix("/v1").partition("?")
        with self.server.lock:
            state.keys.add(self.headers.get("Authorization", ""))
            call = f"{method} {re.sub('_[0-9]+|file-[0-9]+', '', path)}"
            state.calls.append(call)
            fault = state.faults[call].pop(0) if state.faults.get(call) else None
            self.act(fault, lambda: self.do(state, method, path, query, raw))

    def act(self, fault: Any, do: Callable[[], tuple[int, Any]]) -> None:
        """A status is answered and nothing done; the other faults come after it was done."""
        if isinstance(fault, int):
            message = f"a fault; {self.headers.get('Authorization')}"
            return self.answer(fault, {"error": {"message": message, "code": "c"}})
        status, reply = do()
        if fault == "html":
            reply = b"<html>502</html>"
        if callable(fault):
            fault()
        if fault == "lost" or callable(fault):  # without an answer
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        return self.answer(status, reply)

    def do(self, state: Batches, method: str, path: str, query: str, raw: bytes) -> Any:
        parts = path.strip("/").split("/")
        if (method, path) == ("POST", "/files"):
            head = f"Content-Type: {self.headers['Content-Type']}\n\n".encode()
            form = {
                part.get_param("name", header="Content-Disposition"): part.get_payload(decode=True)
                for part in email.message_from_bytes(head + raw).get_payload()
            }
            assert form["purpose"] == b"batch"
            return 200, {"id": state.keep(form["file"]), "object": "file"}
        if (method, path) == ("POST", "/batches"):
            return 200, state.make(json.loads(raw))
        if (method, path) == ("GET", "/batches"):
            after = re.search("after=(batch_[0-9]+)", query)
            names = list(state.made)[::-1]  # the newest first, two a page
            names = names[names.index(after[1]) + 1 :] if after else names
            page = [state.made[name] for name in names[:2]]
            return 200, {"object": "list", "data": page, "has_more": len(names) > 2}
        if parts[0] == "files" and parts[1] in state.files:
            return 200, state.files[parts[1]]
        if parts[0] == "batches" and parts[1] in state.made:
            if parts[-1] == "cancel":
                state.made[parts[1]]["status"] = "cancelling"
                state.plans[parts[1]].states = ["cancelling", "cancelled"]
                return 200, state.made[parts[1]]
            return 200, state.step(parts[1])
        return 404, {"error": {"message": f"nothing at {path}", "code": None}}

    def answer(self, status: int, reply: Any) -> None:
        body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
