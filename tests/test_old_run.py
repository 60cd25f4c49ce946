"""A run folder that version 0.1 left goes on working: nothing is asked, learned or paid for again.

`fixtures/old-run` was made by that version: a toy policy, a scripted judge and reviser, every
stage. `halfway` is what `aif ppo` left when it was stopped after the first of two steps.
"""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aif.cli.verbs import app
from tests.conftest import read_jsonl

pytest.importorskip("torch")
FIXTURE = Path(__file__).parent / "fixtures" / "old-run"
STAGES = ("respond", "revise", "filter", "sft", "resample", "compare", "label", "reward", "ppo")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the old folder, as the working directory: its settings name files beside it."""
    shutil.copytree(FIXTURE, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def invoke(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.output


def test_every_stage_is_passed_over(folder):
    output = invoke("run", "run")
    for name in (*STAGES, "evaluate"):
        assert f"{name}: nothing has changed since it was done" in output


@pytest.mark.parametrize("verb", ["respond", "resample", "revise", "filter", "label"])
def test_no_call_is_made_again(folder, verb):
    """Each verb alone, which knows nothing of the pipeline's notes."""
    journals = {path: path.read_bytes() for path in folder.glob("run/journal/*.jsonl")}
    assert journals
    out = ["--out", "run"] if verb == "label" else ["run"]
    summary = json.loads(invoke(verb, *out, "--json").splitlines()[-1])
    assert summary["calls_made"] == 0
    assert {path: path.read_bytes() for path in folder.glob("run/journal/*.jsonl")} == journals


def test_the_labels_are_the_same(folder):
    rows = read_jsonl(folder / "run" / "labels.jsonl")
    invoke("label", "--out", "run")
    assert read_jsonl(folder / "run" / "labels.jsonl") == rows


def test_ppo_goes_on_from_the_checkpoint(folder):
    for name in ("ppo", "ppo-critic"):
        shutil.rmtree(folder / "run" / name)
    shutil.copytree(folder / "halfway", folder / "run", dirs_exist_ok=True)
    summary = json.loads(invoke("ppo", "run", "--json").splitlines()[-1])
    assert (summary["resumed_from"], summary["steps"]) == (1, 2)
    steps = [row["step"] for row in read_jsonl(folder / "run" / "metrics.jsonl")
             if row["stage"] == "ppo" and row["name"] == "objective/kl"]  # fmt: skip
    assert steps == [1, 2]
