"""Labelling by the Batch API, against an emulated one that ends its batches in every way."""

from __future__ import annotations

import json
import os
import signal

import pytest
from typer.testing import CliRunner

from aif.cli.verbs import app
from aif.config.settings import LLMSettings
from aif.errors import JudgeStopped
from aif.llm import Ask, batch_api, batch_client, open_llm
from aif.llm.batch_api import BatchLLM
from aif.llm.submissions import Session, SubmissionLog
from tests.conftest import Job, aif_here, read_jsonl, write_jsonl
from tests.support.batch_server import Batches, Plan, batches, refusal
from tests.support.clock import wait_for, within
from tests.support.server import hash_of, p_of

KEY = "sk-planted-secret-0123456789"
QUICK = ["judge.poll_s=0.01", "judge.max_wait_s=0.01", "judge.attempts=3"]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with batches() as state:
        yield state


@pytest.fixture
def job(make_job, server) -> Job:
    """Three comparisons in both orders: six requests."""
    batch_job = make_job(3, server.base_url)
    batch_job.judge[1] = "openai-batch:test-model"
    for setting in QUICK:
        batch_job.judge += ["--set", setting]
    return batch_job


def labelled(job: Job, *more: object, code: int = 0) -> str:
    """Label in this process; returns what was said on stderr."""
    done = job.label_here(*more)
    assert done.exit_code == code, done.stderr
    return done.stderr


def probabilities(job: Job) -> list[float | None]:
    return [row["p_first"] for row in read_jsonl(job.run / "labels.jsonl")]


def verdicts(job: Job) -> list[dict]:
    return read_jsonl(job.run / "verdicts.jsonl")


@pytest.fixture(scope="module")
def labels() -> list[float | None]:
    """Filled by the first test that wants `expected`."""
    return []


@pytest.fixture
def expected(job, server, labels) -> list[float | None]:
    """The labels that come of batches without a fault, in another run."""
    if not labels:
        plain = job.fresh("plain")
        labelled(plain)
        server.__init__(int(server.root.rpartition(":")[2]))
        labels += probabilities(plain)
    return labels


# ---- the way through


def test_a_batch_goes_through_its_states_and_is_never_asked_again(job, server):
    stderr = labelled(job)
    for status in ("validating", "in_progress", "finalizing", "completed"):
        assert f"batch_0: {status}" in stderr
    (batch,) = server.made.values()
    assert batch["endpoint"] == "/v1/chat/completions"
    assert batch["completion_window"] == "24h"
    assert list(batch["metadata"]) == ["aif"]
    assert sorted(server.custom_ids) == sorted(row["id"] for row in verdicts(job))
    sent = server.rows("batch_0")[0]
    assert (sent["method"], sent["url"]) == ("POST", "/v1/chat/completions")
    assert (sent["body"]["model"], sent["body"]["top_logprobs"]) == ("test-model", 20)
    calls = list(server.calls)
    assert "6 kept" in job.label_here().stdout
    assert server.calls == calls


def test_a_verdict_is_that_of_its_own_request(job, server):
    labelled(job)
    by_id = {row["id"]: row for row in verdicts(job)}
    for row in server.rows("batch_0"):
        messages = json.dumps(row["body"]["messages"], ensure_ascii=False, sort_keys=True)
        p_a = p_of(hash_of(messages))
        verdict = by_id[row["custom_id"]]
        assert verdict["p_first"] == pytest.approx(p_a if verdict["order"] == "ab" else 1 - p_a)


def test_responses_are_sampled_by_batches_too(tmp_path, server):
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    arguments = ["respond", tmp_path / "run", "--prompts", prompts, "--samples", "2"]
    arguments += ["--policy", "openai-batch:test-model", "--set", "policy.poll_s=0.01"]
    arguments += ["--set", f"policy.base_url={server.base_url}"]
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.stderr
    assert len(read_jsonl(tmp_path / "run" / "responses.jsonl")) == 4
    assert len(server.made) == 1


# ---- what is in the files


def reverse(output, errors):
    output.reverse()


def with_strangers(output, errors):
    stranger = dict(output[0], custom_id="nobody")
    twice = refusal(output[0], 400, "c", "rejected")
    output += [stranger, twice, "not JSON", dict(stranger, custom_id=["a"])]


def into_errors(output, errors):
    """An answer counts wherever it stands."""
    errors += output[3:]
    del output[3:]


@pytest.mark.parametrize("edit", [reverse, with_strangers, into_errors])
def test_rows_are_joined_by_their_id(job, server, expected, edit):
    server.next = [Plan(edit=edit)]
    stderr = labelled(job)
    assert probabilities(job) == expected
    assert len(server.made) == 1
    if edit is with_strangers:
        assert "passed over: 2 rows unknown, 1 rows repeated, 1 rows unreadable" in stderr


@pytest.mark.parametrize("states", [["expired"], ["cancelling", "cancelled"], ["completed"]])
@pytest.mark.parametrize("rest", ["batch_expired", None])
@pytest.mark.parametrize("answered", [0, 4])
def test_what_a_batch_leaves_out_is_asked_again(job, server, expected, states, rest, answered):
    server.next = [Plan(["in_progress", *states], answered, rest)]
    labelled(job)
    assert probabilities(job) == expected
    again = [row["custom_id"] for row in server.rows("batch_1")]
    assert again == [row["custom_id"] for row in server.rows("batch_0")][answered:]
    assert len(server.made) == 2


def test_what_never_gets_an_answer_is_a_fault_after_so_many_batches(job, server):
    server.next = [Plan(["expired"], 4)] + [Plan(["expired"], 0) for _ in range(2)]
    labelled(job, code=3)
    assert [len(server.rows(name)) for name in server.made] == [6, 2, 2]
    faults = [row for row in read_jsonl(job.journal) if row["fault"]]
    assert [row["fault"] for row in faults] == ["timeout"] * 2
    assert faults[0]["detail"] == "batch_expired: This request was not executed. (3 batches)"


@pytest.mark.parametrize(("state", "fault"), [("expired", "timeout"), ("cancelled", "backend")])
def test_a_batch_that_ends_without_any_row_says_how_it_ended(job, server, state, fault):
    server.next = [Plan([state], 0, None) for _ in range(3)]
    labelled(job, code=3)
    rows = read_jsonl(job.journal)
    assert [row["fault"] for row in rows] == [fault] * 6
    assert rows[0]["detail"] == f"the batch ended as {state} without it (3 batches)"


def with_errors(output, errors):
    errors.append(refusal(output.pop(0), 400, "invalid_request_error", "no such thing"))
    errors.append(refusal(output.pop(0), 400, "context_length_exceeded", "too long"))
    errors.append(refusal(output.pop(0), 429, "rate_limit_exceeded", "slow down"))
    errors.append(refusal(output.pop(0), 500, "server_error", "oops"))
    output[0]["response"]["body"]["choices"] = []


def test_rows_of_the_error_file_are_faults_or_asked_again(job, server):
    server.next = [Plan(edit=with_errors)]
    labelled(job, code=3)
    first = [row["custom_id"] for row in server.rows("batch_0")]
    assert [row["custom_id"] for row in server.rows("batch_1")] == first[2:4]
    faults = {row["id"]: row["fault"] for row in verdicts(job)}
    assert [faults[key] for key in first] == [
        "rejected",
        "too_long",
        None,
        None,
        "malformed",
        None,
    ]
    labelled(job)  # those three only
    assert sorted(row["custom_id"] for row in server.rows("batch_2")) == sorted(
        [*first[:2], first[4]]
    )


def without_quota(output, errors):
    errors.append(refusal(output.pop(), 429, "insufficient_quota", "no money"))


def test_an_end_of_quota_loses_no_answer(job, server):
    server.next = [Plan(edit=without_quota)]
    assert "no quota left" in labelled(job, code=1)
    labelled(job)
    assert [len(server.rows(name)) for name in server.made] == [6, 1]


# ---- batches that are refused


def test_a_batch_that_fails_validation_is_one_line(job, server, expected):
    errors = [{"code": "invalid_json_line", "message": "Line 3 is no JSON.", "line": 3}] * 2
    server.next = [Plan(["validating", "failed"], errors=errors)]
    stderr = labelled(job, code=1).splitlines()[-1]
    assert "batch_0 was refused (line 3: invalid_json_line Line 3 is no JSON. and 1 more)" in stderr
    labelled(job)
    assert probabilities(job) == expected
    assert len(server.made) == 2


def queue_full(states=("failed",)) -> Plan:
    return Plan(list(states), errors=[{"code": "token_limit_exceeded", "message": "Enqueued."}])


def test_a_full_queue_is_waited_for(job, server, expected, monkeypatch):
    monkeypatch.setattr(batch_client, "MAX_REQUESTS", 2)
    server.next = [Plan(), queue_full(), queue_full(), Plan(), queue_full(), Plan()]
    labelled(job, "--set", "judge.attempts=1")
    assert probabilities(job) == expected
    assert [len(server.rows(name)) for name in server.made] == [2, 2, 2, 2, 2, 2]


def test_a_queue_that_is_full_of_others_ends_it(job, server):
    server.next = [queue_full()]
    assert "batch_0 was refused (token_limit_exceeded Enqueued.)" in labelled(job, code=1)
    assert len(server.made) == 1


# ---- one submission is one batch


@pytest.mark.parametrize("fault", [429, 500, "lost", "html"])
def test_a_create_that_fails_makes_no_second_batch(job, server, expected, fault):
    server.faults = {"POST /batches": [fault]}
    labelled(job)
    assert probabilities(job) == expected
    assert len(server.made) == 1
    assert server.calls.count("POST /batches") == (2 if isinstance(fault, int) else 1)


def test_a_create_that_is_refused_is_one_line_and_made_anew(job, server):
    server.faults = {"POST /batches": [400]}
    assert "the server refused (HTTP 400" in labelled(job, code=1)
    labelled(job)
    assert (len(server.made), server.calls.count("POST /files")) == (1, 2)


@pytest.mark.parametrize("others", [0, 5])
def test_killed_between_create_and_record(job, server, expected, others):
    """By SIGKILL, from within the server; the batch is found again after those of others."""
    server.faults = {"POST /batches": [lambda: os.kill(process.pid, signal.SIGKILL)]}
    with job.start() as process:
        assert process.wait(30) == -signal.SIGKILL
    (batch,) = server.made.values()
    log = read_jsonl(job.run / "journal" / "label.batches.jsonl")
    assert [row["tag"] for row in log] == [batch["metadata"]["aif"]]
    for _ in range(others):
        server.make({"input_file_id": batch["input_file_id"], "metadata": None})
    labelled(job)
    assert probabilities(job) == expected
    assert len(server.made) == 1 + others
    assert server.calls.count("POST /batches") == 1


def test_every_batch_that_is_looked_for_is_found(server):
    for tag in ("first", "another", "second", "last"):
        server.make({"input_file_id": "f", "metadata": {"aif": tag}})
    with client(server) as llm:
        assert llm.find({"first", "second"}) == {"first": "batch_0", "second": "batch_2"}


def test_what_is_done_in_parts_stays_done(tmp_path):
    with SubmissionLog.open(tmp_path / "x.batches.jsonl") as submissions:
        planned = submissions.plan("openai-batch:m", "/v1/completions", "file-1", ["a", "b", "c"])
        submissions.created(planned, "batch_1")
        for key in ("a", "b"):
            submissions.finish(planned, [key])
        (left,) = submissions.under_way()
    assert (left.batch, left.left()) == ("batch_1", ["c"])


def test_killed_between_record_and_create(job, server, expected, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(BatchLLM, "create", lambda *_: 1 / 0)
        labelled(job, code=1)
    assert not server.made
    labelled(job)
    assert probabilities(job) == expected
    assert (len(server.made), server.calls.count("POST /files")) == (1, 1)


def test_killed_before_the_answers_are_logged_as_done(job, server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(SubmissionLog, "finish", lambda *_: 1 / 0)
        labelled(job, code=1)
    labelled(job)
    assert len(server.made) == 1
    assert len(read_jsonl(job.journal)) == 6


def test_a_fault_is_kept_once_and_then_asked_again(job, server, monkeypatch):
    server.next = [Plan(edit=with_errors)]
    with monkeypatch.context() as patch:
        patch.setattr(SubmissionLog, "finish", lambda *_: 1 / 0)
        labelled(job, code=1)
    labelled(job, code=3)  # the batch that was never marked as done is read again
    labelled(job)
    assert [len(server.rows(name)) for name in server.made] == [6, 2, 3]


# ---- leave and come back


def test_interrupted_while_it_waits(job, server, expected):
    server.held = True
    with job.start() as process:
        wait_for(lambda: "GET /batches/batch" in server.calls)
        with within(5):  # no drain: there is nothing to be waited for
            process.send_signal(signal.SIGINT)
            stderr = process.communicate()[1]
    assert process.returncode == 130
    assert "6 requests in batches go on at http://127.0.0.1" in stderr
    assert "the same command comes back" in stderr
    server.held = False
    assert "batch_0: handed in before, 6 requests" in labelled(job)
    assert probabilities(job) == expected
    assert len(server.made) == 1


def left_running(job: Job, server: Batches, monkeypatch) -> None:
    """A labelling that gives up at its second look."""
    server.held = True
    with monkeypatch.context() as patch:
        patch.setattr(batch_api, "MOST_FAILED_LOOKS", 3)
        server.faults = {"GET /batches/batch": [None, 500, 500, 500]}
        assert "it is silent; the batches go on" in labelled(job, code=1)
    server.held = False


def test_what_another_command_wants_is_left_in_its_batch(job, server, expected, monkeypatch):
    left_running(job, server, monkeypatch)
    labelled(job, "--limit", "1")
    assert len(read_jsonl(job.journal)) == 2
    labelled(job)
    assert probabilities(job) == expected
    assert len(read_jsonl(job.journal)) == 6
    assert len(server.made) == 1


def test_only_what_is_new_is_handed_in(job, server, monkeypatch):
    left_running(job, server, monkeypatch)
    with job.pairs.open("a") as file:
        file.write(json.dumps({"prompt": "p", "response_a": "x", "response_b": "y"}) + "\n")
    labelled(job)
    assert [len(server.rows(name)) for name in server.made] == [6, 2]
    assert len(set(server.custom_ids)) == 8


def test_a_look_that_fails_now_and_then_ends_nothing(job, server, monkeypatch):
    monkeypatch.setattr(batch_api, "MOST_FAILED_LOOKS", 3)
    server.faults = {"GET /batches/batch": [500, "lost", None, "html", 503, None]}
    labelled(job)
    assert len(server.made) == 1


def test_a_batch_that_the_server_does_not_know_is_not_paid_for_again(job, server, monkeypatch):
    left_running(job, server, monkeypatch)
    server.faults = {"GET /batches/batch": [404]}
    stderr = labelled(job, code=1)
    assert "batch_0" in stderr
    assert "was it another key?" in stderr
    labelled(job)
    assert len(server.made) == 1


def test_batches_are_listed_and_cancelled(job, server, expected, monkeypatch):
    assert aif_here("batches", job.folder).returncode == 0
    left_running(job, server, monkeypatch)
    server.plans["batch_0"].answered = 4
    arguments = ["batches", str(job.run), "--base-url", server.base_url]
    listed = CliRunner().invoke(app, arguments)
    assert "journal/label: batch_0 of openai-batch:test-model, 6 requests" in listed.stdout
    assert "POST /batches/batch/cancel" not in server.calls
    cancelled = CliRunner().invoke(app, [*arguments, "--cancel"])
    assert "6 requests, cancelling" in cancelled.stdout
    labelled(job)
    assert probabilities(job) == expected
    assert [len(server.rows(name)) for name in server.made] == [6, 2]
    assert CliRunner().invoke(app, arguments).stdout == "no batches\n"


# ---- limits and secrets


def questions(number: int, **more) -> list[Ask]:
    messages = [{"role": "user", "content": "q"}]
    return [Ask(f"{n}", **({"messages": messages} | more)) for n in range(number)]


def client(server: Batches, **more) -> BatchLLM:
    quick = {"poll_s": 0.01, "max_wait_s": 0.01, "attempts": 2}
    settings = {"model": "openai-batch:test-model", "base_url": server.base_url}
    return open_llm(LLMSettings(**(settings | quick | more)))


def test_files_are_as_full_as_they_may_be(server, monkeypatch):
    with client(server) as llm:
        (whole,) = llm.requests(questions(7))
        assert bytes(whole.content).count(b"\n") == 7
        line = len(whole.content) // 7
        monkeypatch.setattr(batch_client, "MAX_BYTES", 2 * line)
        assert [file.keys for file in llm.requests(questions(5))] == [["0", "1"], ["2", "3"], ["4"]]
        monkeypatch.setattr(batch_client, "MAX_BYTES", 2 * line - 1)
        assert [len(file.keys) for file in llm.requests(questions(3))] == [1, 1, 1]
        monkeypatch.setattr(batch_client, "MAX_BYTES", 10**9)
        monkeypatch.setattr(batch_client, "MAX_REQUESTS", 3)
        assert [len(file.keys) for file in llm.requests(questions(7))] == [3, 3, 1]
        plain = questions(1, messages=None, text="t")
        endpoints = [file.endpoint for file in llm.requests([*questions(1), *plain])]
        assert endpoints == ["/v1/chat/completions", "/v1/completions"]


@pytest.mark.parametrize("logprobs", [True, False])
def test_log_probabilities_are_asked_for_where_they_are_wanted(server, logprobs):
    with client(server, logprobs=logprobs) as llm:
        (file,) = llm.requests(questions(1, options=("A", "B")))
    assert ("logprobs" in json.loads(bytes(file.content))["body"]) == logprobs


def test_several_batches_are_waited_for_together(job, server, expected, monkeypatch):
    monkeypatch.setattr(batch_client, "MAX_REQUESTS", 2)
    server.next = [Plan(["in_progress"] * 5 + ["completed"]), Plan(["completed"]), Plan()]
    stderr = labelled(job)
    assert probabilities(job) == expected
    assert stderr.index("batch_1: completed") < stderr.index("batch_0: completed")
    assert len(server.made) == 3


def test_secrets_stay_off_the_disk(job, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    job.judge[3] = server.base_url.replace("://", "://alice:hunter2@") + "?token=t0ken"
    server.next = [Plan(["failed"], errors=[{"code": "c", "message": f"bad {KEY}"}])]
    server.faults = {"POST /files": [500], "GET /batches/batch": [None, None, 401]}
    stderr = labelled(job, code=1) + labelled(job, code=1) + labelled(job)
    assert "Basic" in "".join(server.keys)
    texts = [path.read_text() for path in job.run.rglob("*") if path.is_file()] + [stderr]
    for secret in (KEY, "alice", "hunter2", "t0ken", "YWxpY2U"):
        assert not [text for text in texts if secret in text]


def test_a_server_without_batches_is_one_line(job, server):
    server.faults = {"POST /files": [404]}
    assert "is there a Batch API?" in labelled(job, code=1)


def test_a_file_that_cannot_be_had_ends_it_and_loses_nothing(job, server):
    server.faults = {"GET /files//content": [500, "html", 503, 500]}
    labelled(job, code=1)
    labelled(job)
    assert len(server.made) == 1


def test_batches_need_a_place_to_be_written_down(server, tmp_path):
    from aif.errors import AifError

    with client(server) as llm, pytest.raises(AifError, match="need a run folder"):
        list(llm.answer(questions(1)))
    assert not server.calls


def test_nothing_is_over_before_it_is_durable(server, tmp_path):
    """The log has answers as done only after the session has committed them to the disk."""

    def cannot() -> None:
        raise JudgeStopped("the disk is full")

    def keys_of_pass(commit) -> list[str]:
        session = Session(tmp_path / "x.batches.jsonl", commit, lambda: False, lambda line: None)
        with client(server) as llm:
            llm.resume_with(session)
            return [answer.key for answer in llm.answer(questions(2))]

    with pytest.raises(JudgeStopped, match="disk is full"):
        keys_of_pass(cannot)
    assert keys_of_pass(lambda: None) == ["0", "1"]
    assert len(server.made) == 1
    assert keys_of_pass(lambda: None) == ["0", "1"]
    assert len(server.made) == 2
