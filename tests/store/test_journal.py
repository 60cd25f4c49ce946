"""The journal against crashes, full disks, bad sectors and strange text, without a model."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aif.config.settings import Settings
from aif.errors import AifError, InputError, RunBusy
from aif.run import Run
from aif.store import jsonl
from aif.store.journal import Index, Journal, encode
from tests.support.clock import within

# All of Unicode, lone surrogates included, and often the characters that end lines elsewhere. (Two
# surrogates that make a pair are one character as soon as they have been through JSON.)
texts = (
    st.text(st.characters(), max_size=40)
    | st.text(
        st.sampled_from('\ud800\udfff\u2028\u2029\x85\0\n\r\v\f\x1c\u202e\u2066\ufeff\\"{}a'),
        max_size=40,
    )
).map(lambda text: json.loads(json.dumps(text)))
anywhere = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def row(number: int, fault: str | None = None, text: str = "A") -> dict:
    return {"id": key(number), "fault": fault, "texts": [text]}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "journal" / "label.jsonl"


def fill(path: Path, count: int = 5) -> list[dict]:
    rows = [row(number) for number in range(count)]
    with Journal.open(path) as journal:
        for one in rows:
            journal.append(one)
    return rows


def rows_in(path: Path) -> list[dict]:
    """What counts now, in the order of ids."""
    with Journal.open(path) as journal:
        return sorted_rows(journal.newest(raw.hex()) for raw in journal.index.answered)


def sorted_rows(rows) -> list[dict]:
    return sorted(({k: v for k, v in r.items() if k != "crc"} for r in rows), key=lambda r: r["id"])


def test_what_is_written_is_read_back(path):
    rows = fill(path, 300)
    assert rows_in(path) == sorted_rows(rows)


def test_a_row_counts_only_once_it_is_durable(path, monkeypatch):
    with Journal.open(path) as journal:
        in_fsync = []
        fsync = os.fsync

        def slow(descriptor):
            in_fsync.append((bytes.fromhex(key(1)) in journal.index.answered, journal.durable))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", slow)
        journal.append(row(1))
        journal.commit()
        assert in_fsync == [(False, 0)]
        assert (bytes.fromhex(key(1)) in journal.index.answered, journal.durable) == (True, 1)


def test_rows_that_a_killed_process_left_in_memory_are_synced_before_they_count(path, monkeypatch):
    path.parent.mkdir()
    path.write_bytes(encode(row(1)))
    events = []
    fsync, read = os.fsync, Index.read
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))
    )
    monkeypatch.setattr(Index, "read", lambda path: (events.append("read"), read(path))[1])
    Journal.open(path).close()
    assert str(path) in events[: events.index("read")]


def test_a_fault_is_kept_but_never_an_answer(path):
    with Journal.open(path) as journal:
        journal.append(row(1, "refused"))
        journal.append(row(2))
        journal.append(row(2, "timeout"))
    with Journal.open(path) as journal:
        assert list(journal.index.failed) == [bytes.fromhex(key(1))]
        assert journal.newest(key(1))["fault"] == "refused"
        assert journal.newest(key(2))["fault"] is None
        assert journal.newest(key(3)) is None


def test_torn_anywhere_in_the_last_row_only_that_row_is_lost(path):
    rows = fill(path)
    whole = path.read_bytes()
    last = len(encode(rows[-1]))
    for cut in range(1, last + 1):
        path.write_bytes(whole[:-cut])
        with Journal.open(path) as journal:
            assert len(journal.index.answered) == len(rows) - 1, cut
            damage = [(d.line, d.key in (key(4), "?")) for d in journal.index.damage]
            assert damage == ([(5, True)] if cut < last else [])
            journal.append(rows[-1])
        assert path.read_bytes() == whole, cut


@pytest.mark.parametrize("place", ["id", "fault", "text", "crc", "brace", "newline"])
@pytest.mark.parametrize("number", [0, 2])
def test_a_flipped_bit_is_reported_with_line_and_key_and_costs_that_row_alone(path, place, number):
    rows = fill(path)
    lines = path.read_bytes().splitlines(keepends=True)
    line = lines[number]
    at = {
        "id": 20,
        "fault": line.index(b"null"),
        "text": line.index(b'["A"]') + 2,
        "crc": len(line) - 5,
        "brace": 0,
        "newline": len(line) - 1,
    }[place]
    for bit in range(8):
        bad = bytearray(line)
        bad[at] ^= 1 << bit
        path.write_bytes(b"".join([*lines[:number], bytes(bad), *lines[number + 1 :]]))
        with Journal.open(path) as journal:
            lost = {number, number + 1} if place == "newline" else {number}
            left = {bytes.fromhex(r["id"]) for n, r in enumerate(rows) if n not in lost}
            assert journal.index.answered.keys() == left
            damage = " ".join(f"{d.line}:{d.key}" for d in journal.index.damage)
            assert damage.startswith(f"{number + 1}:")
            if place != "id":
                assert all(key(n) in damage for n in lost)


@given(data=st.binary(max_size=400), at=st.floats(0, 1))
@anywhere
def test_garbage_in_the_middle_costs_no_whole_row_elsewhere(tmp_path, data, at):
    path = tmp_path / "journal" / "label.jsonl"
    path.unlink(missing_ok=True)
    rows = fill(path)
    lines = path.read_bytes().splitlines(keepends=True)
    number = int(at * len(lines))
    path.write_bytes(b"".join([*lines[:number], data + b"\n", *lines[number:]]))
    assert rows_in(path) == sorted_rows(rows)


def failing(monkeypatch, name: str, number: int, left: int = 0):
    """Make the next os.NAME fail; with `left`, only after a write took so many bytes."""
    real = getattr(os, name)
    state = {"left": left}

    def call(descriptor, *arguments):
        if state["left"] and name == "write":
            taken = real(descriptor, arguments[0][: state["left"]])
            state["left"] = 0
            return taken
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize(
    ("name", "number"), [("write", errno.ENOSPC), ("write", errno.EFBIG), ("fsync", errno.EIO)]
)
def test_a_failed_write_is_loud_and_leaves_what_was_durable(path, monkeypatch, name, number):
    rows = fill(path, 3)
    before = path.read_bytes()
    journal = Journal.open(path)
    with monkeypatch.context() as patch:
        failing(patch, name, number, left=30)
        journal.append(row(7))
        with pytest.raises(AifError, match=os.strerror(number)):
            journal.commit()
        with pytest.raises(AifError):
            journal.append(row(8))
    assert bytes.fromhex(key(7)) not in journal.index.answered
    with pytest.raises(AifError):
        journal.close()
    assert path.read_bytes() == before
    with Journal.open(path) as again:
        again.append(row(7))
    assert rows_in(path) == sorted_rows([*rows, row(7)])


def test_nobody_waits_for_a_writer_that_died_of_something_else(path, monkeypatch):
    journal = Journal.open(path)
    monkeypatch.setattr(os, "fsync", lambda fd: {}[fd])
    journal.append(row(1))
    with pytest.raises(AifError, match="could not be written"):
        journal.commit()


def test_an_error_while_opening_is_one_line(path, monkeypatch):
    fill(path)
    path.write_bytes(path.read_bytes()[:-1])
    failing(monkeypatch, "ftruncate", errno.EIO)
    with pytest.raises(AifError, match="could not be opened: Input/output error"):
        Journal.open(path)


def test_a_journal_that_was_cut_under_our_feet_is_an_error_and_no_endless_loop(path):
    fill(path)
    with Journal.open(path) as journal:
        os.truncate(path, 10)
        with pytest.raises(AifError, match="cut it short"):
            journal.newest(key(0))


def test_many_rows_share_an_fsync(path, monkeypatch):
    with Journal.open(path) as journal:
        calls = []
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(fd), fsync(fd)))
        for number in range(100):
            journal.append(row(number))
            time.sleep(0.001)
        journal.commit()
    assert len(calls) < 50


def test_a_row_of_ten_megabytes(path):
    rows = [row(1), row(2, text="x" * 10_000_000), row(3)]
    with Journal.open(path) as journal:
        for one in rows:
            journal.append(one)
    assert rows_in(path) == sorted_rows(rows)


@given(st.lists(texts, max_size=8))
@anywhere
def test_any_text_survives_the_journal(tmp_path, contents):
    path = tmp_path / "journal" / "label.jsonl"
    path.unlink(missing_ok=True)
    rows = [row(number, text=text) for number, text in enumerate(contents)]
    with Journal.open(path) as journal:
        for one in rows:
            journal.append(one)
    assert rows_in(path) == sorted_rows(rows)
    assert path.read_bytes().count(b"\n") == len(rows) if rows else True


@given(st.lists(st.dictionaries(texts, texts, max_size=3), max_size=8))
@anywhere
def test_any_text_survives_a_jsonl_file(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    assert jsonl.write(path, rows) == len(rows)
    assert [one for _, one in jsonl.read(path)] == rows
    assert path.read_bytes().isascii()


@pytest.mark.parametrize(
    ("line", "got"),
    [
        (b'{"a":', "bad JSON: Expecting value at character "),
        (b'{"a":NaN}', "bad JSON: NaN is not JSON, "),
        (b'{"a":1,"a":2}', "bad JSON: a key stands twice in one object, "),
        (b'{"a":' + b"9" * 5000 + b"}", "bad JSON: "),
        (b"[" * 100_000, "bad JSON: nested too deeply, "),
        (b"7", "7, expected a JSON object on one line"),
        (b"null", "None, "),
        (b"\xff", "bad UTF-8: "),
    ],
)
def test_a_bad_line_is_an_error_that_names_it(tmp_path, line, got):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{}\n" + line + b"\n")
    with pytest.raises(InputError, match=rf"rows\.jsonl:2: got {got}"):
        list(jsonl.read(path))


def test_a_folder_is_no_file_of_rows(tmp_path):
    with pytest.raises(InputError, match=": got a folder, expected a JSONL file"):
        list(jsonl.read(tmp_path))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.jsonl"
    jsonl.write(path, [{"a": 1}])

    def rows():
        yield {"a": 2}
        raise InputError("somewhere", "", got="x", expected="y")

    with pytest.raises(InputError):
        jsonl.write(path, rows())
    assert path.read_text() == '{"a":1}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_replaced_file_has_the_mode_that_the_umask_asks_for(tmp_path):
    before = os.umask(0o027)
    try:
        jsonl.write(tmp_path / "rows.jsonl", [])
    finally:
        os.umask(before)
    assert (tmp_path / "rows.jsonl").stat().st_mode & 0o777 == 0o640


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path):
    run = Run(tmp_path / "run", Settings())
    run.path.mkdir()
    (run.path / ".labels.jsonl.0123abcd.part").write_text("half a")
    with run.writing():
        assert [path.name for path in run.path.iterdir()] == ["lock"]


def test_a_second_writer_is_told_who_the_first_is(tmp_path):
    run = Run(tmp_path / "run", Settings())
    other = Run(tmp_path / "run", Settings())
    with run.writing(), pytest.raises(RunBusy, match=f"pid {os.getpid()}"), other.writing():
        pass
    with other.writing():
        pass


READ = textwrap.dedent("""
    import sys
    from pathlib import Path
    from aif.store.journal import Index
    index = Index.read(Path(sys.argv[1]))
    assert len(index.answered) == int(sys.argv[2])
    print([l for l in open("/proc/self/status") if l.startswith("VmHWM")][0].split()[1])
""")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read in /proc")
def test_fifty_thousand_rows_open_in_bounded_time_and_memory(path):
    """A twentieth of a million; `bench/journal_resume.py` measures the whole."""
    path.parent.mkdir()
    draw = random.Random(0)
    with path.open("wb") as file:
        for number in range(50_000):
            more = {"logprobs": {"A": -draw.random(), "B": -draw.random()}, "usage": {"n": 400}}
            file.write(encode(row(number) | more))
    with within(5):
        done = subprocess.run(
            [sys.executable, "-c", READ, path, "50000"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert int(done.stdout) < 100_000  # kB
