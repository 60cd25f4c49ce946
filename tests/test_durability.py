"""Runs that are killed, starved of disk, interrupted or edited, through the real command line.

What must hold each time: what was durable is there, it is not asked again, and the labels are
those of a run that nothing happened to.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aif.config.settings import LabelSettings, LLMSettings
from aif.constitution import file as constitutions
from aif.data.readers import read_pairs
from aif.judge.judge import Judge
from aif.store.journal import Index
from tests.conftest import Job, read_jsonl, write_constitution, write_jsonl
from tests.support.clock import slowdown, wait_for, within
from tests.support.server import hash_of, serving

NO_KILLS = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=none", "true"]


@pytest.fixture(scope="module")
def strace():
    """The start of a command whose system calls are made to fail."""
    try:
        able = subprocess.run(NO_KILLS, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        able = False
    if not able:
        pytest.skip("strace is absent or not allowed here")

    def prefix(inject: str, path: Path | None = None) -> list[str]:
        only = ["-P", str(path)] if path else []
        trace = inject.partition(":")[0]
        flags = ["-f", "-qq", "-o", "/dev/null", *only, "-e", f"trace={trace}"]
        return ["strace", *flags, "-e", f"inject={inject}"]

    return prefix


@pytest.fixture(scope="module")
def quick_server():
    """A server that answers in 5 ms; each test looks at differences of its counts."""
    with serving(latency_ms=5) as server:
        yield server


@pytest.fixture
def server(quick_server):
    quick_server.set_faults()
    quick_server.reset()
    return quick_server


def answered(job: Job) -> set[str]:
    """Ids of the answers that a new process would find."""
    return {raw.hex() for raw in Index.read(job.journal).answered}


def errors(stderr: str) -> list[str]:
    """The error lines of a command; there is never more than one, and never a traceback."""
    assert "Traceback" not in stderr, stderr
    assert "Exception ignored" not in stderr, stderr
    assert "a fault of aif" not in stderr, stderr
    return [line for line in stderr.splitlines() if line.startswith("aif: ")]


def finish(job: Job, durable: set[str], labels: bytes) -> None:
    """Resume to the end: only what is not durable is asked, and the labels are `labels`."""
    done = job.label_here("--json")
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["calls_kept"], summary["calls_made"]) == (
        len(durable),
        summary["verdicts"] - len(durable),
    )
    assert job.labels == labels
    assert durable <= answered(job)
    assert not list(job.run.glob(".*")), "left over"


def unfaulted(job: Job) -> Job:
    """The same job, done in one go in another run folder."""
    clean = job.fresh("clean")
    done = clean.label_here()
    assert done.exit_code == 0, done.stderr
    return clean


# Rows 1 and 2: kills


def prompt_hashes(job: Job, base_url: str) -> dict[str, str]:
    """Call id -> what the test server calls the request of that call."""
    model = LLMSettings(model="openai:test-model", base_url=base_url)
    judge = Judge(constitutions.load(job.constitution), model, LabelSettings())
    hashes = {}
    for pair in read_pairs(str(job.pairs)):
        for call in judge.calls_for(pair.comparison):
            messages = judge.ask(call, pair.comparison).messages
            hashes[call.id] = hash_of(json.dumps(messages, ensure_ascii=False, sort_keys=True))
    return hashes


@pytest.mark.slow
def test_forty_kills_lose_nothing_and_nothing_durable_is_asked_twice(make_job):
    kills, concurrency, draw = 40, 6, random.Random(0)
    with serving(latency_ms=50, latency_sigma=0.5) as server:
        job = make_job(400, server.base_url, concurrency)
        hashes = prompt_hashes(job, server.base_url)
        durable: set[str] = set()
        requests: Counter[str] = Counter()
        moments = set()
        for number in range(kills):
            process = job.start()
            if number % 2:  # some kills fall into the start, the others into the calls
                next(line for line in process.stderr if "calls to make" in line)
            time.sleep(draw.uniform(0, 0.5))
            process.kill()
            process.communicate()
            before, requests = requests, Counter(server.stats(detail=True)["by_prompt"])
            now = answered(job)
            assert durable <= now
            assert not {hashes[key] for key in durable} & (requests - before).keys()
            lost = requests.keys() - {hashes[key] for key in now}
            assert len(lost) <= concurrency + 40, "a kill costs what was in flight or in a buffer"
            durable = now
            moments.add(len(durable))
        assert len(moments) > 5, "most kills came too early or too late to show anything"
        job.judge[-1] = "64"
        finish(job, durable, unfaulted(job).labels)


@pytest.fixture
def small(make_job) -> tuple[Job, bytes]:
    """A job of 20 calls by a scripted judge, and its labels."""
    job = make_job(10)
    clean = unfaulted(job)
    assert len({row["p_first"] for row in read_jsonl(clean.run / "labels.jsonl")}) > 5
    return job, clean.labels


@pytest.mark.slow
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_killed_at_every_fsync_and_rename(strace, small, call):
    job, labels = small
    for number in itertools.count(1):
        job = job.fresh(f"run{number}")
        done = job.label(prefix=strace(f"{call}:signal=SIGKILL:when={number}"))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        finish(job, answered(job), labels)
    assert number > 5, "nothing was killed"


@pytest.mark.parametrize("inject", ["write:signal=SIGKILL:when=1", "fsync:signal=SIGKILL:when=2"])
def test_killed_in_the_journals_writer(strace, make_job, inject):
    job = make_job(300)  # several groups
    clean = unfaulted(job)
    done = job.label(prefix=strace(inject, job.journal))
    assert done.returncode == -signal.SIGKILL
    finish(job, answered(job), clean.labels)


# Rows 3, 4 and 7: a disk that is full, broken or limited


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system whose size is set by calling it."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", place], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a tmpfs needs root")

    def resize(kilobytes: int) -> Path:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", place], check=True)
        return place

    yield resize
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("kilobytes", [4, 16, 40, 48, 56, 64, 80, 128])
def test_a_full_disk_is_loud_and_resumes_on_a_larger_one(make_job, tiny_disk, kilobytes):
    job = make_job(100)  # needs about 150 kB
    clean = unfaulted(job)
    job = job.fresh(str(tiny_disk(kilobytes) / "run"))
    done = job.label_here()
    assert done.exit_code == 1
    (message,) = errors(done.stderr)
    assert "No space left on device" in message
    tiny_disk(4096)
    finish(job, answered(job), clean.labels)


def test_a_disk_that_fills_up_during_a_resume_keeps_what_was_durable(make_job, tiny_disk):
    job = make_job(100)
    clean = unfaulted(job)
    job = job.fresh(str(tiny_disk(60) / "run"))  # room for about 170 of the 200 answers
    job.journal.parent.mkdir(parents=True)
    with clean.journal.open("rb") as file:
        job.journal.write_bytes(b"".join(itertools.islice(file, 100)))
    durable = answered(job)
    done = job.label_here()
    assert done.exit_code == 1
    assert "No space left on device" in errors(done.stderr)[0]
    assert answered(job) >= durable
    tiny_disk(4096)
    finish(job, answered(job), clean.labels)


@pytest.mark.parametrize("bytes_", [2000, 24_000, 30_000, 50_000])
def test_a_file_size_limit_is_loud_and_resumes_without_it(make_job, bytes_):
    job = make_job(100)
    clean = unfaulted(job)
    limit = (bytes_, bytes_)
    done = job.label(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert done.returncode == 1
    (message,) = errors(done.stderr)
    assert "File too large" in message
    finish(job, answered(job), clean.labels)


def test_a_journal_that_breaks_with_calls_in_flight_ends_in_one_line(make_job, server):
    job = make_job(100, server.base_url)
    limit = (24_000, 24_000)  # comparisons.jsonl fits, the journal does not
    done = job.label(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert done.returncode == 1
    (message,) = errors(done.stderr)
    assert "label.jsonl: could not be written: File too large" in message
    assert "pending" not in done.stderr, "a request was left behind"
    finish(job, answered(job), unfaulted(job).labels)


@pytest.mark.slow
def test_an_input_output_error_at_any_fsync_is_loud(strace, small):
    job, labels = small
    for number in itertools.count(1):
        job = job.fresh(f"run{number}")
        done = job.label(prefix=strace(f"fsync:error=EIO:when={number}"))
        if done.returncode == 0:
            break
        assert done.returncode == 1
        assert "Input/output error" in errors(done.stderr)[0]
        finish(job, answered(job), labels)
    assert number > 5


def test_rows_whose_fsync_failed_do_not_count(strace, make_job):
    job = make_job(300)
    clean = unfaulted(job)
    done = job.label(prefix=strace("fsync:error=EIO:when=2", job.journal))
    assert done.returncode == 1
    (message,) = errors(done.stderr)
    assert "Input/output error" in message
    kept = int(re.search(r"\(([\d,]+) new rows\)", message)[1].replace(",", ""))
    durable = answered(job)
    assert 0 < len(durable) == kept < 600
    finish(job, durable, clean.labels)


# Rows 5 and 6, as the command line tells them


def test_a_damaged_line_is_told_and_asked_again(small):
    job, labels = small
    job.label_here()
    lines = job.journal.read_bytes().splitlines(keepends=True)
    key = json.loads(lines[3])["id"]
    lines[3] = lines[3].replace(b"stop", b"stoq")
    job.journal.write_bytes(b"".join(lines)[:-9])
    done = job.label_here("--json")
    assert f"{job.journal}:4: damaged (key {key})" in done.stderr
    assert f"{job.journal}:{len(lines)}: damaged (key " in done.stderr
    assert json.loads(done.stdout)["calls_made"] == 2
    assert job.labels == labels


# Row 8: signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_lets_the_calls_in_flight_come_in(make_job, number):
    with serving(latency_ms=200) as server:
        job = make_job(100, server.base_url, concurrency=16)
        process = job.start()
        wait_for(lambda: server.stats()["requests"] >= 32)
        process.send_signal(number)
        _, stderr = process.communicate()
        assert process.returncode == 130
        assert "stopping" in stderr
        assert errors(stderr) == ["aif: interrupted; the same command resumes"]
        stats = server.stats()
        durable = answered(job)
        assert 32 <= len(durable) == stats["answered"] == stats["requests"] < 200
        partial = read_jsonl(job.run / "labels.jsonl")
        assert 0 < len(partial) < 100
        job.judge[-1] = "64"
        clean = unfaulted(job)
        server.reset()
        finish(job, durable, clean.labels)
        assert server.stats()["requests"] == 200 - len(durable)


def test_a_second_signal_leaves_at_once(make_job, server):
    server.set_faults({"kind": "hang"})
    job = make_job(100, server.base_url)
    process = job.start()
    wait_for(lambda: server.stats()["requests"] >= 16)
    process.send_signal(signal.SIGINT)
    next(line for line in process.stderr if "stopping" in line)
    with within(1):
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode == 130
    server.set_faults()
    assert job.label_here().exit_code == 0


def driven(job: Job, code: str, **options) -> subprocess.Popen[str]:
    """The command line in a process that first runs some code."""
    main = f"import sys; {code}; from aif.cli.verbs import main; sys.argv[0] = 'aif'; main()"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", main, *job.arguments()], **pipes | options)


def test_a_drain_has_a_deadline(make_job, server):
    server.set_faults({"kind": "hang", "match": "prompt 7"})
    job = make_job(100, server.base_url)
    process = driven(job, "import aif.llm.dispatch; aif.llm.dispatch.DRAIN_S = 1.0")
    wait_for(lambda: server.stats()["faults"].get("hang", 0) >= 16)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert 0.9 < time.monotonic() - start < 4 * slowdown()
    assert process.returncode == 130
    assert "given up" in errors(stderr)[0]
    durable = answered(job)
    assert len(durable) == server.stats()["answered"]
    server.set_faults()
    clean = unfaulted(job)
    finish(job, durable, clean.labels)


def test_a_signal_while_nobody_reads_our_stderr_still_drains(make_job):
    with serving(latency_ms=200) as server:
        job = make_job(100, server.base_url)
        process = job.start("--quiet")
        wait_for(lambda: server.stats()["requests"] >= 16)
        process.stderr.close()
        process.send_signal(signal.SIGINT)
        process.wait()
        assert len(answered(job)) == server.stats()["requests"] < 200


# Row 9: two writers


def test_a_second_writer_is_refused_and_a_killed_one_leaves_no_lock(make_job, server):
    server.set_faults({"kind": "hang"})
    job = make_job(20, server.base_url)
    first = job.start()
    wait_for(lambda: server.stats()["requests"] > 0)
    second = job.label()
    assert second.returncode == 1
    (message,) = errors(second.stderr)
    assert f"pid {first.pid}" in message
    first.kill()
    first.communicate()
    server.set_faults()
    assert job.label_here().exit_code == 0


# Row 10: what an edit costs


@pytest.fixture(scope="module")
def finished(quick_server, tmp_path_factory) -> Job:
    """A labelled job of 20 comparisons under two principles; copied, never changed."""
    folder = tmp_path_factory.mktemp("finished")
    job = Job(folder, folder / "run", ["--judge", "openai:test-model"])
    job.judge += ["--base-url", quick_server.base_url, "--concurrency", "32"]
    write_jsonl(job.pairs, pairs(range(20)))
    write_constitution(job.constitution, QUESTIONS)
    assert job.label_here().exit_code == 0
    return job


QUESTIONS = {"kind": "Which response is kinder?", "plain": "Which response is plainer?"}


def pairs(numbers) -> list[dict[str, str]]:
    return [
        {"prompt": f"prompt {n}", "response_a": f"left {n}", "response_b": f"right {n}"}
        for n in numbers
    ]


def copied(job: Job, folder: Path) -> Job:
    shutil.copytree(job.folder, folder / "copy")
    return Job(folder / "copy", folder / "copy" / "run", list(job.judge))


def another_question(job):
    write_constitution(job.constitution, QUESTIONS | {"kind": "Which response is warmer?"})


def another_weight(job):
    write_constitution(job.constitution, QUESTIONS, kind="weight = 3.0")


def another_name(job):
    questions = {"gentle" if name == "kind" else name: q for name, q in QUESTIONS.items()}
    write_constitution(job.constitution, questions)


def one_more(job):
    write_constitution(job.constitution, QUESTIONS | {"short": "Which response is shorter?"})


def one_less(job):
    write_constitution(job.constitution, {"kind": QUESTIONS["kind"]})


def another_preamble(job):
    write_constitution(job.constitution, QUESTIONS, head='preamble = "Be strict."')


def another_template(job):
    text = "{% block user %}{{ question }} {{ first }} or {{ second }}? A or B.{% endblock %}"
    (job.folder / "short.jinja").write_text(text)
    job.judge += ["--set", f"label.template={job.folder}/short.jinja"]


def another_model(job):
    job.judge[1] = "openai:other-model"


def another_address(job):
    job.judge[3] = job.judge[3].replace("127.0.0.1", "localhost")


def another_temperature(job):
    job.judge += ["--set", "judge.temperature=0.5"]


def other_rows(job):
    write_jsonl(job.pairs, pairs([*range(5, 20), *range(90, 97)]))


def another_order_of_rows(job):
    write_jsonl(job.pairs, pairs(reversed(range(20))))


def another_speed(job):
    job.judge[5] = "3"


@pytest.mark.parametrize(
    ("edit", "calls", "message"),
    [
        (another_question, 40, "principle 'kind' was edited"),
        (another_weight, 0, "only weights or rules of the constitution changed"),
        (another_name, 0, "principle 'gentle' is new"),
        (one_more, 40, "principle 'short' is new"),
        (one_less, 0, "principle 'plain' is gone"),
        (another_preamble, 80, "preamble changed"),
        (another_template, 80, "template changed"),
        (another_model, 80, "model openai:test-model -> openai:other-model"),
        (another_address, 80, "base_url http://127.0.0.1"),
        (another_temperature, 80, "temperature 0.0 -> 0.5"),
        (other_rows, 28, "the data changed"),
        (another_order_of_rows, 0, "the data changed"),
        (another_speed, 0, "0 calls to make; 80 answers kept"),
    ],
)
def test_an_edit_costs_its_own_calls_and_leaves_no_stale_label(
    finished, server, tmp_path, edit, calls, message
):
    job = copied(finished, tmp_path)
    edit(job)
    done = job.label_here()
    assert done.exit_code == 0, done.stderr
    assert server.stats()["requests"] == calls
    assert message in done.stderr
    fresh = job.fresh("fresh")
    fresh.label_here()
    assert job.labels == fresh.labels
    assert server.stats()["requests"] > calls, "the fresh run was not fresh"


def test_another_seed_asks_only_what_is_drawn_anew(finished, server, tmp_path):
    job = copied(finished, tmp_path)
    write_constitution(job.constitution, QUESTIONS, head='principles = "sample"')
    job.run = job.folder / "sampled"
    job.label_here()
    first = answered(job)
    assert len(first) == server.stats()["requests"] == 40
    done = job.label_here("--seed", "7")
    drawn = {row["id"] for row in read_jsonl(job.run / "verdicts.jsonl")}
    assert server.stats()["requests"] - 40 == len(drawn - first) > 0
    assert f"{len(drawn - first)} calls to make" in done.stderr
    assert f"{len(first - drawn)} answers no longer used" in done.stderr
    fresh = job.fresh("fresh")
    fresh.label_here("--seed", "7")
    assert job.labels == fresh.labels


def test_undoing_an_edit_is_free(finished, server, tmp_path):
    job = copied(finished, tmp_path)
    another_question(job)
    job.label_here()
    write_constitution(job.constitution, QUESTIONS)
    server.reset()
    job.label_here()
    assert server.stats()["requests"] == 0
    assert job.labels == finished.labels


# Labels depend on what is asked, not on how it went


def test_labels_do_not_depend_on_concurrency_order_of_arrival_or_resumes(make_job):
    labels = set()
    with serving(latency_ms=3, latency_sigma=1.5) as server:
        job = make_job(100, server.base_url)
        for concurrency in (1, 7, 64):
            one = job.fresh(f"run{concurrency}")
            one.judge = [*job.judge[:-1], str(concurrency)]
            assert one.label_here().exit_code == 0
            labels.add(one.labels)
        one = job.fresh("resumed")
        for limit in (1, 30, 31, 80, 100):
            assert one.label_here("--limit", limit).exit_code == 0
        labels.add(one.labels)
    assert len(labels) == 1


# Rows 15 and 17: strange texts


texts = st.text(
    st.sampled_from('\ud800\udfff\u2028\u2029\x85\0\r\n\v\x1c\u202e\u2066\ufeff\\"{}%a<|')
    | st.characters(),
    max_size=30,
).map(lambda text: json.loads(json.dumps(text)))  # two surrogates that make a pair are one then


@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=6))
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_text_goes_through_a_labelling(make_job, rows):
    job = make_job(0)
    shutil.rmtree(job.run, ignore_errors=True)
    names = ("prompt", "response_a", "response_b")
    write_jsonl(job.pairs, (dict(zip(names, row, strict=True)) for row in rows))
    write_jsonl(job.folder / "rules.jsonl", [{"match": "", "text": "A"}])
    done = job.label_here("--json")
    assert done.exit_code == 0, done.stderr
    kept = read_jsonl(job.run / "comparisons.jsonl")
    assert {(row["first"], row["second"]) for row in kept} == {row[1:] for row in rows}
    labels = read_jsonl(job.run / "labels.jsonl")
    assert [row["comparison_id"] for row in labels] == [row["id"] for row in kept]
    for row, label in zip(kept, labels, strict=True):
        same = row["first"] == row["second"]
        assert (label["fault"], label["p_first"] is None) == (("identical" if same else None), same)


def test_odd_rows_get_an_outcome_and_the_run_goes_on(make_job, server):
    job = make_job(0, server.base_url)
    rows = pairs(range(3))
    rows[1]["response_a"] = "x" * 10_000_000
    odd = [("", "something"), ("", ""), ("same", "same"), (" ", "\n")]
    rows += [{"id": "9", "prompt": "p", "response_a": a, "response_b": b} for a, b in odd]
    rows += [rows[0], rows[0] | {"id": "another id"}]
    write_jsonl(job.pairs, rows)
    done = job.label_here("--json", "--max-fault-rate", "0.3")
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["data"]["rows"], summary["data"]["repeated_rows"]) == (9, 2)
    faults = [row["fault"] for row in read_jsonl(job.run / "labels.jsonl")]
    assert faults == [None, "too_long", None, None, "identical", "identical", None]
    assert summary["calls_made"] == 10


def test_a_huge_answer_is_a_fault_of_its_row(make_job, server):
    server.set_faults({"kind": "huge", "match": "prompt 3"})
    job = make_job(10, server.base_url)
    done = job.label_here("--json", "--max-fault-rate", "0.2")
    assert done.exit_code == 0, done.stderr
    rows = read_jsonl(job.run / "labels.jsonl")
    assert [row["fault"] for row in rows].count("unparsed") == 1
    assert sum(row["p_first"] is not None for row in rows) == 9


# Row 18: the clock


JUMPING_CLOCK = """
import itertools, time
real, days = time.time, itertools.cycle((-10, 10, 0))
time.time = lambda: real() + 86400 * next(days)
"""


def test_a_clock_that_jumps_by_ten_days_changes_nothing(make_job, server):
    job = make_job(30, server.base_url)
    clean = unfaulted(job)
    server.set_faults({"kind": "429", "retry_after": "date+0", "p": 0.2, "times": 1})
    code = f"exec({JUMPING_CLOCK!r})"
    process = driven(job, code)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert job.labels == clean.labels
    assert answered(job) == answered(clean)
    assert server.stats()["faults"]["429"] > 0
