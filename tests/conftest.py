"""What the tests share: where things are, `aif` in this process and as one of its own."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from aif.cli.verbs import app
from tests.support import processes

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
AIF = [sys.executable, "-m", "aif"]


def pytest_configure() -> None:
    # Before torch is loaded: bits depend on the number of threads, and models this small need one.
    os.environ["OMP_NUM_THREADS"] = "1"
    processes.adopt()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is ended first


def pytest_collection_finish() -> None:
    # Every training looks for garbage when it begins: not among all that is imported.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """End what the test has started and left, also when it has run into its time limit."""
    before = processes.children()
    try:
        return (yield)
    finally:
        processes.end_children(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of real data sets that lies beside some checkouts."""
    if not DATA.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return DATA


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of tests/support/tiny.py with dropout, to be read only."""
    from tests.support.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of tests/support/toy.py, to be read only."""
    from tests.support.toy import save_toy

    return save_toy(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An XDG_CACHE_HOME in which `smollm2-135m` is a tiny model; see tests/support/documents.py."""
    from tests.support.documents import tiny_bundled

    return tiny_bundled(tmp_path_factory.mktemp("cache"))


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open("rb") as file:
        return [json.loads(line) for line in file]


def aif(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `aif` to its end; the caller looks at the exit code."""
    command = [*options.pop("prefix", []), *AIF, *map(str, arguments)]
    options = {"capture_output": True, "text": True} | options
    return subprocess.run(command, check=False, **options)


def aif_here(
    *arguments: object, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`aif` in this process, which saves the start of another; `env` is added to ours."""
    result = CliRunner(env=env).invoke(app, [str(part) for part in arguments])
    stderr = result.stderr
    if result.exception and not isinstance(result.exception, SystemExit):
        stderr += "".join(traceback.format_exception(result.exception))
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, stderr)


@dataclass
class Job:
    """A small labelling and the files it needs; `label()` starts or resumes it."""

    folder: Path
    run: Path
    judge: list[str]

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs.jsonl"

    @property
    def constitution(self) -> Path:
        return self.folder / "constitution.toml"

    @property
    def journal(self) -> Path:
        return self.run / "journal" / "label.jsonl"

    @property
    def labels(self) -> bytes:
        return (self.run / "labels.jsonl").read_bytes()

    def arguments(self, *more: object) -> list[str]:
        files = ["--pairs", self.pairs, "--constitution", self.constitution]
        return [str(part) for part in ("label", "--out", self.run, *files, *self.judge, *more)]

    def label(self, *more: object, **options: Any) -> subprocess.CompletedProcess[str]:
        return aif(*self.arguments(*more), **options)

    def label_here(self, *more: object) -> Result:
        """The same command line in this process, which saves the start of another."""
        return CliRunner().invoke(app, self.arguments(*more))

    def start(self, *more: object, **options: Any) -> subprocess.Popen[str]:
        """The same without waiting for it."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*AIF, *self.arguments(*more)], **pipes | options)

    def fresh(self, name: str) -> Job:
        """The same job in a run folder of its own."""
        return Job(self.folder, self.folder / name, self.judge)


def write_constitution(path: Path, questions: dict[str, str], head: str = "", **more: str) -> None:
    """A constitution of these principles; `more` are lines to add to one of them."""
    blocks = [f'name = "test"\n{head}\n']
    for name, question in questions.items():
        blocks.append(f'[[principle]]\nid = "{name}"\ncompare = "{question}"\n{more.get(name, "")}')
    path.write_text("\n".join(blocks))


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Job]:
    """A job of `comparisons` under one principle; `base_url` or else a scripted judge."""

    def make(comparisons: int, base_url: str | None = None, concurrency: int = 16) -> Job:
        job = Job(tmp_path, tmp_path / "run", [])
        rows = (
            {"prompt": f"prompt {n}", "response_a": f"left {n}", "response_b": f"right {n}"}
            for n in range(comparisons)
        )
        write_jsonl(job.pairs, rows)
        write_constitution(job.constitution, {"kind": "Which response is kinder?"})
        if base_url:
            job.judge = ["--judge", "openai:test-model", "--base-url", base_url]
            job.judge += ["--concurrency", str(concurrency)]
        else:
            rules = tmp_path / "rules.jsonl"
            write_jsonl(rules, scripted_rules())
            job.judge = ["--judge", f"scripted:{rules}"]
        return job

    return make


def scripted_rules() -> list[dict[str, Any]]:
    """Answers that differ from comparison to comparison and between the two orders."""
    return [
        {
            "match": rf"response A \w+\]\nleft \d*{digit}\n",
            "logprobs": {"A": -0.1 * digit - 0.1, "B": -2},
        }
        for digit in range(10)
    ] + [
        {"match": rf"right \d*{digit}\n", "logprobs": {"A": -0.7 - digit / 3, "B": -0.7}}
        for digit in range(10)
    ]
