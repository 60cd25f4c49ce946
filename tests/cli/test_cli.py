"""The command line as a person or a script meets it."""

import fcntl
import json
import os
import pty
import re
import statistics
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aif.cli.verbs import app
from aif.llm import Answer
from aif.llm.scripted import ScriptedLLM
from aif.pipeline import Stage
from tests.conftest import AIF, aif, write_constitution, write_jsonl
from tests.support.clock import slowdown

LOGPROBS = {"A": -0.1, "B": -2.5}
BUILTIN_VERBS = ("label", "plan", "respond", "revise", "filter", "vote", "sft", "compare")
BUILTIN_VERBS += ("run", "status", "export", "constitution")


def cli(*arguments: object):
    """`aif` in this process: quick, with stdout and stderr apart."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class Place:
    """A folder with pairs, a constitution and a scripted judge."""

    def __init__(self, folder: Path, rules: list[dict] | None = None):
        self.folder, self.run = folder, folder / "run"
        self.constitution = folder / "constitution.toml"
        self.rules = write_jsonl(folder / "rules.jsonl", rules or [{"logprobs": LOGPROBS}])
        rows = [{"prompt": f"p{n}", "response_a": "x", "response_b": "y"} for n in range(10)]
        self.pairs = write_jsonl(folder / "pairs.jsonl", rows)
        self.prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": "p"}, {"prompt": "q"}])
        write_constitution(self.constitution, {"kind": "Which is kinder?", "warm": "Warmer?"})

    def arguments(self, *more: object) -> list[object]:
        files = ["--pairs", self.pairs, "--constitution", self.constitution]
        return ["--out", self.run, *files, "--judge", f"scripted:{self.rules}", *more]

    def label(self, *more: object):
        return cli("label", *self.arguments(*more))

    def plan(self, *more: object) -> dict:
        result = cli("plan", *self.arguments("--json", *more))
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.fixture
def sampler(monkeypatch):
    """Every model is one that answers differently to each sample."""

    def reply(ask):
        return Answer(
            "", texts=(f"text {ask.seed}",), logprobs=dict(LOGPROBS) if ask.options else None
        )

    for module in ("aif.stages.respond", "aif.judge.calls"):
        monkeypatch.setattr(f"{module}.open_llm", lambda _: ScriptedLLM(reply))


# ---- exit codes and errors


@pytest.mark.parametrize(
    "arguments",
    [
        ["label"],
        ["label", "--out", "r", "--nope"],
        ["label", "--out", "r", "--limit", "many"],
        ["nope"],
        ["export"],
        ["constitution"],
        ["constitution", "check"],
        [],
    ],
)
def test_wrong_usage_is_exit_2(arguments):
    result = cli(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["label", "--out", "r", "--constitution", "gone.toml"], "gone.toml"),
        (["plan", "--constitution", "gone.toml"], "gone.toml"),
        (
            ["label", "--out", "r", "--constitution", "c.toml", "--pairs", "gone.jsonl"],
            "gone.jsonl",
        ),
        (["label", "--out", "r", "--constitution", "c.toml", "--judge", "scripted:gone"], "gone"),
        (["label", "--out", "r"], "label: constitution"),
        (["label", "--out", "r", "--constitution", "c.toml"], "label: pairs"),
        (["label", "--out", "r", "--set", "judge.modle=x"], "judge.modle"),
        (["label", "--out", "r", "--judge", "nope:x", "--constitution", "c.toml"], "nope:x"),
        (["respond", "r"], "respond: prompts"),
        (["respond", "r", "--prompts", "gone.jsonl"], "gone.jsonl"),
        (["compare", "gone"], "gone"),
        (["run", "gone"], "gone"),
        (["status", "gone"], "gone"),
        (["export", "gone"], "gone"),
        (["constitution", "check", "gone.toml"], "gone.toml"),
        (["constitution", "show", "gone.toml"], "gone.toml"),
    ],
)
def test_what_is_missing_is_one_line_that_names_it(tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    write_constitution(tmp_path / "c.toml", {"kind": "Which is kinder?"})
    write_jsonl(tmp_path / "rules.jsonl", [{"text": "A"}])
    if "--judge" not in arguments and arguments[0] in ("label", "plan"):
        arguments = [*arguments, "--judge", "scripted:rules.jsonl"]
    if arguments[0] == "respond":
        arguments = [*arguments, "--policy", "scripted:rules.jsonl"]
    result = cli(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.fullmatch(rf"aif: .*{re.escape(named)}.*\n", result.stderr)
    assert "Traceback" not in result.stderr


def test_debug_adds_the_traceback(tmp_path):
    result = cli("status", tmp_path / "gone", "--debug")
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("aif: ")


def test_an_error_line_obeys_no_terminal_escape(tmp_path):
    file = write_jsonl(tmp_path / "pairs.jsonl", [{"\x1b[31mred": 1, "\u202eevil": 2}])
    place = Place(tmp_path)
    place.pairs = write_jsonl(file, [{"\x1b[31mred": 1, "\u202eevil": 2}])
    result = place.label()
    assert result.exit_code == 1
    assert r"\x1b[31mred" in result.stderr
    assert "\x1b" not in result.stderr
    assert "\u202e" not in result.stderr


@pytest.mark.parametrize(("allowed", "code"), [(None, 3), (0.49, 3), (0.5, 0)])
def test_too_many_faults_are_exit_3(tmp_path, allowed, code):
    place = Place(tmp_path, [{"match": "Warmer", "fault": "refused"}, {"logprobs": LOGPROBS}])
    result = place.label(*(["--max-fault-rate", allowed] if allowed else []))
    assert result.exit_code == code
    assert (
        len((place.run / "labels.jsonl").read_text().splitlines()) == 10
    )  # it is done all the same
    if code:
        assert re.search(r"^aif: .*run: 50\.0% of the calls .*20 refused", result.stderr, re.M)


@pytest.mark.parametrize("name", ["label", "revise", "filter", "ppo", "evaluate"])
def test_every_stage_that_asks_a_model_ends_with_3_when_too_much_fails(tmp_path, monkeypatch, name):
    faults = {"faults": {"refused": 2}, "fault_details": {"refused": ""}}
    summary = {"run": "r", "fault_rate": 0.5} | faults
    monkeypatch.setattr(Stage, "function", lambda stage: lambda run, progress: summary)
    run = ["--out", tmp_path] if name == "label" else [tmp_path]
    result = cli(name, *run, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout) == summary
    assert "50.0% of the calls have no answer (2 refused)" in result.stderr


# ---- output for machines


def one_object(result) -> dict:
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    summary = json.loads(line)
    assert isinstance(summary, dict)
    return summary


def test_json_is_one_object_for_every_verb(place, sampler):
    folder = place.folder
    assert one_object(cli("plan", *place.arguments("--json")))["calls"] == 40
    assert one_object(place.label("--json"))["labels"] == 10
    assert one_object(cli("status", place.run, "--json"))["stages"]["label"]["answers"] == 40
    assert one_object(cli("export", place.run, "--json"))["rows"] == 0  # all alike, so all even
    check = one_object(cli("constitution", "check", place.constitution, "--json"))
    assert (check["principles"], check["notes"]) == (2, [])
    shown = one_object(cli("constitution", "show", place.constitution, "--json"))
    assert shown["principle"][0]["weight"] == 1.0
    other = folder / "other"
    respond = cli("respond", other, "--prompts", place.prompts, "--json")
    assert one_object(respond)["responses"] == 4
    assert one_object(cli("compare", other, "--json"))["comparisons"] == 2
    sets = [f"--set=respond.prompts={place.prompts}"]
    sets += [f"--set=label.constitution={place.constitution}", "--set=label.protocol=pairwise"]
    sets += ['--set=pipeline.stages=["respond", "compare", "label"]']
    stages = one_object(cli("run", other, *sets, "--json"))
    assert list(stages) == ["respond", "compare", "label"]
    assert stages["label"]["labels"] == 2
    assert stages["respond"]["calls_made"] == 0  # the first respond had paid for them


def test_quiet_says_nothing(place, sampler):
    for result in (
        place.label("--quiet"),
        cli("respond", place.folder / "o", "--prompts", place.prompts, "--quiet"),
        cli("compare", place.folder / "o", "--quiet"),
    ):
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    loud = place.label()
    assert loud.stdout.splitlines()[-1] == f"{place.run}/labels.jsonl"
    assert "0 calls to make; 40 answers kept" in loud.stderr


def test_constitution_check_tells_notes_and_errors_apart(tmp_path):
    file = tmp_path / "c.toml"
    write_constitution(file, {"kind": "Be kind."})
    noted = cli("constitution", "check", file)
    assert (noted.exit_code, noted.stderr) == (0, "")
    assert noted.stdout == f"note: kind.compare: asks no question\n{file}: 1 principles, ok\n"
    file.write_text("nmae = 3")
    assert cli("constitution", "check", file).exit_code == 1


# ---- plan


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def test_plan_asks_nothing_and_writes_nothing(place, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    before = tree(place.folder)
    nobody = ["--judge", "openai:x", "--base-url", "http://127.0.0.1:9/v1"]
    plan = place.plan(*nobody)  # a second --judge: both are asked
    assert (plan["calls"], plan["comparisons"]) == (80, 10)
    assert place.plan()["calls"] == 40
    assert tree(place.folder) == before
    place.label()
    before = tree(place.folder)
    assert place.plan("--seed", "3")["calls"] == 0
    assert tree(place.folder) == before


def test_label_does_what_plan_said(place):
    rows = [json.loads(line) for line in place.pairs.read_text().splitlines()]
    rows += [rows[0], rows[1] | {"response_b": "x"}, rows[2] | {"response_b": "z"}]
    write_jsonl(place.pairs, rows)

    def both(*more: object) -> tuple[dict, dict]:
        more = ("--limit", 100, *more)
        planned = place.plan(*more)
        done = json.loads(place.label("--json", "--quiet", *more).stdout)
        assert planned["calls"] == done["calls_made"]
        assert planned["calls_kept"] == done["calls_kept"]
        assert planned["comparisons"] == done["labels"]
        assert sum(planned["calls_by_principle"].values()) == planned["calls"]
        return planned, done

    first, _ = both("--limit", 4)
    assert (first["calls"], first["changes"]) == (16, [])
    second, done = both()
    assert (second["calls"], second["calls_kept"]) == (28, 16)
    assert done["data"]["repeated_rows"] == 1
    assert done["labels_null"] == {"identical": 1}
    write_constitution(place.constitution, {"kind": "Which is kinder?", "warm": "Which is warmer?"})
    third, _ = both()
    assert third["calls_by_principle"] == {"warm": 22}
    assert third["changes"] == ["principle 'warm' was edited"]
    assert third["answers_unused"] == 22
    more = "weight = 2.0"
    write_constitution(
        place.constitution, {"kind": "Which is kinder?", "warm": "Which is warmer?"}, warm=more
    )
    fourth, _ = both()
    assert fourth["calls"] == 0
    assert "no call is needed" in fourth["changes"][0]
    fifth, _ = both("--protocol", "pairwise", "--set", "judge.samples=2")
    assert fifth["calls"] == 44
    assert fifth["completion_tokens_at_most"] == 88


def test_plan_counts_what_failed_before(tmp_path):
    place = Place(tmp_path, [{"match": "Warmer", "fault": "refused"}, {"logprobs": LOGPROBS}])
    place.label()
    planned = place.plan()
    assert (planned["calls"], planned["calls_after_fault"], planned["calls_kept"]) == (20, 20, 20)


# ---- output for people


def test_piped_output_is_plain(place):
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "40"}
    commands = [["--help"], ["label", "--help"], ["label", *place.arguments()]]
    commands += [["status", place.run], ["plan", *place.arguments()], ["nope"]]
    for command in commands:
        result = aif(*command, env=env)
        said = result.stdout + result.stderr
        assert said.strip()
        assert "\x1b" not in said
        assert "\r" not in said


def test_a_narrow_terminal_gets_a_bar_that_fits(place):
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 40, 0, 0))
    env = os.environ | {"TERM": "xterm"}
    env.pop("COLUMNS", None)
    command = [*AIF, "label", *map(str, place.arguments())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, env=env)
    os.close(terminal)
    shown = b""
    while chunk := read_or_end(controller):
        shown += chunk
    assert process.wait() == 0
    os.close(controller)
    process.stdout.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "40/40" in text
    bars = [line for line in re.split(r"[\r\n]+", text) if "/40" in line]
    assert all(len(line) <= 40 for line in bars)


def read_or_end(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # Linux says EIO when the other end is closed
        return b""


def test_help_names_every_verb_and_exit_code():
    result = cli("--help")
    assert all(re.search(rf"^  {verb} ", result.stdout, re.M) for verb in BUILTIN_VERBS)
    assert all(f"{code} " in result.stdout.replace("\n", " ") for code in (0, 1, 2, 3, 4, 130))


HELP = """
import sys
from aif.cli.verbs import main
sys.argv = ["aif", "--help"]
try:
    main()
except SystemExit:
    print("LOADED", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_help_loads_nothing_heavy():
    out = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    loaded = set(out.stdout.partition("LOADED")[2].split())
    assert "aif" in loaded
    heavy = {"torch", "transformers", "openai", "pandas", "datasets", "numpy", "aiohttp", "jinja2"}
    assert not loaded & (heavy | {"pydantic", "rich"})


def test_help_is_quick():
    def seconds() -> float:
        start = time.perf_counter()
        assert aif("--help").returncode == 0
        return time.perf_counter() - start

    assert statistics.median(seconds() for _ in range(5)) < 0.3 * slowdown()
