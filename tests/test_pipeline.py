"""`aif run`: from prompts to a report, what a change does again, and what a kill costs."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tomli_w

from aif.cli.run import run_lines, status_lines
from aif.config.settings import load_settings
from aif.errors import InputError, TooManyFaults
from aif.pipeline import STAGES, run_all, select, steps
from aif.planning import plan
from aif.run import Run
from aif.status import status
from tests.conftest import AIF, ROOT, aif_here, read_jsonl, write_jsonl
from tests.support.clock import slowdown
from tests.support.tiny import Said, quick, save_tiny

CONSTITUTION = """
name = "x"
[[principle]]
id = "kind"
weight = 1.0
grade = "Is it kind?"
cue = "Kind"
critique = "Say what is unkind."
revision = "Make it kind."
[[principle]]
id = "short"
grade = "Is it short?"
cue = "Short"
"""
SHIPPED = sorted((ROOT / "runs").glob("*/run.toml"))
TRAINING = ["sft", "resample", "compare", "label", "reward", "ppo"]
ALL = ["respond", "revise", *TRAINING, "evaluate", "report"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """A folder with a finished run, a copy of it, and the stages that were done."""
    folder, copy = tmp_path_factory.mktemp("place"), tmp_path_factory.mktemp("copy") / "of-place"
    write_run(folder)
    with quick():
        done = do(folder)
    shutil.copytree(folder, copy)
    return folder, copy, done


@pytest.fixture
def place(finished) -> Path:
    """The folder of a finished run, as it was: paths are absolute, so it always lies there."""
    folder, copy, _ = finished
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)  # times of files too
    return folder


@pytest.fixture
def fresh(tmp_path) -> Path:
    """A folder with all that a run of eight prompts needs."""
    write_run(tmp_path)
    return tmp_path


def write_run(tmp_path: Path) -> None:
    """All that a run of eight prompts needs, and its run.toml."""
    model = save_tiny(tmp_path / "tiny", attention_dropout=0.0)
    rows = [{"id": f"p{n}", "prompt": f"question {n}"} for n in range(8)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    write_jsonl(tmp_path / "held-out.jsonl", [{"prompt": f"other {n}"} for n in range(4)])
    rules = [{"match": r"a[^\]]{0,9}\n\[", "logprobs": {"Yes": -0.2, "No": -1.8}}]
    rules += [{"match": f"[{end}]", "logprobs": {"Yes": -1.0 - n / 9, "No": -0.4}}
              for n, end in enumerate("zqx")]  # fmt: skip
    rules += [{"match": "", "logprobs": {"Yes": -0.9, "No": -0.5}}]
    write_jsonl(tmp_path / "judge.jsonl", rules)
    write_jsonl(tmp_path / "reviser.jsonl", [{"match": "", "text": "A kinder word for you."}])
    (tmp_path / "c.toml").write_text(CONSTITUTION)
    small = {"max_steps": 2, "batch_size": 4, "dtype": "float32", "learning_rate": 1e-3}
    tables = {
        "policy": {"model": str(model), "max_tokens": 8, "dtype": "float32"},
        "respond": {"prompts": str(tmp_path / "prompts.jsonl"), "samples": 3},
        "reviser": {"model": f"scripted:{tmp_path / 'reviser.jsonl'}"},
        "revise": {"rounds": 1},
        "judge": {"model": f"scripted:{tmp_path / 'judge.jsonl'}", "form": "chat"},
        "label": {"constitution": str(tmp_path / "c.toml"), "protocol": "pointwise"},
        "sft": small | {"eval_fraction": 0.2},
        "reward": small | {"eval_fraction": 0.2},
        "ppo": small | {"eval_fraction": 0.2, "ppo_epochs": 1, "gold": "judge"},
        "evaluate": {"prompts": str(tmp_path / "held-out.jsonl"), "resamples": 100},
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.toml").write_text(tomli_w.dumps(tables))


def opened(place: Path, **changes: object) -> Run:
    path = place / "run"
    return Run(path, load_settings(path / "run.toml", changes))


def do(place: Path, first=None, until=None, only=None, **changes) -> list[str]:
    """Run it; returns the stages that were done."""
    run = opened(place, **changes)
    return list(run_all(select(steps(run), first, until, only), Said()))


def test_from_nothing_to_a_report_and_then_nothing(finished, place):
    assert finished[2] == ALL
    run = opened(place)
    for step in steps(run):
        for name in step.stage.writes.split():
            assert run.file(name).exists(), name
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*.jsonl")}
    assert do(place) == []
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*.jsonl")} == before
    # Preferences are of the fine-tuned policy's responses.
    texts = {row["text"] for row in read_jsonl(run.path / "resampled.jsonl")}
    compared = read_jsonl(run.path / "comparisons.jsonl")
    assert all({row["first"], row["second"]} <= texts for row in compared)
    assert not texts & {row["text"] for row in read_jsonl(run.path / "responses.jsonl")}
    result = aif_here("run", run.path)
    assert result.returncode == 0, result.stderr
    assert "nothing has changed" in result.stdout
    assert "wins are against sft" in result.stdout
    assert "\nppo " in result.stdout
    assert result.stdout.rstrip().endswith("report.html")
    run.write_state("audit", {})  # as a new audit does
    assert do(place) == ["report"]


def test_a_change_does_again_what_depends_on_it(place):
    assert do(place, until="label") == []
    constitution = place / "c.toml"
    constitution.write_text(CONSTITUTION.replace("Is it short?", "Is it brief?"))
    # A revision's principle is as it was, so what is revised again comes out the same.
    assert do(place, until="label") == ["revise", "label"]
    constitution.write_text(CONSTITUTION.replace("weight = 1.0", "weight = 2.0"))
    assert "label" in do(place, until="label")
    run = opened(place)
    assert run.state("label")["calls_made"] == 0
    (run.path / "labels.jsonl").write_bytes(b"")
    assert do(place, until="label") == ["label"]
    assert (run.path / "labels.jsonl").stat().st_size
    assert do(place, until="label", **{"respond.seed": 1}) == ALL[: ALL.index("label") + 1]


def test_a_policy_that_was_trained_anew_is_asked_anew(place):
    first = read_jsonl(place / "run" / "resampled.jsonl")
    assert do(place, until="resample", **{"sft.learning_rate": 3e-3}) == ["sft", "resample"]
    assert opened(place).state("resample")["calls_made"] == len(first)


def test_a_part_of_it(fresh):
    assert do(fresh, until="revise") == ["respond", "revise"]
    assert do(fresh, first="revise", until="resample") == ["sft", "resample"]
    assert do(fresh, only="compare") == ["compare"]
    run = opened(fresh)
    with pytest.raises(InputError, match=r"--from.*tea.*one of respond, revise"):
        select(steps(run), "tea", None, None)
    with pytest.raises(InputError, match=r"--until.*respond.*compare or a stage after it"):
        select(steps(run), "compare", "respond", None)
    wrong = opened(fresh, **{"pipeline.stages": ["respond", "tea"]})
    with pytest.raises(InputError, match=r"pipeline.*stages.*tea.*expected one of respond"):
        steps(wrong)


def test_another_iteration_begins_where_the_last_one_ended(fresh):
    names = ["respond", "compare", "label", "reward", "ppo"]
    changes = {"pipeline.iterations": 2, "pipeline.stages": names}
    assert do(fresh, **changes) == [*names, *(f"2/{name}" for name in names)]
    rows = read_jsonl(fresh / "run" / "2" / "responses.jsonl")
    assert {row["policy"] for row in rows} == {str(fresh / "run" / "ppo")}
    assert (fresh / "run" / "2" / "ppo" / "model.safetensors").exists()
    assert do(fresh, **changes) == []


def test_labels_with_too_many_faults_are_not_learned_from(place):
    write_jsonl(place / "judge.jsonl", [{"match": "", "fault": "refused"}])
    shutil.rmtree(place / "run" / "journal")  # nothing that was answered before
    shutil.rmtree(place / "run" / "reward")
    (place / "run" / "labels.jsonl").unlink()
    with pytest.raises(TooManyFaults):
        do(place, first="label")
    assert not (place / "run" / "reward").exists()


def test_the_faults_of_revise_are_held_against_its_own_rate(fresh):
    write_jsonl(fresh / "reviser.jsonl", [{"match": "", "fault": "timeout"}])
    changes = {"label.max_fault_rate": 1.0, "revise.max_fault_rate": 0.5}
    with pytest.raises(TooManyFaults):
        do(fresh, until="revise", **changes)
    do(fresh, until="revise", **changes | {"revise.max_fault_rate": 1.0})


def test_half_a_policy_is_not_sampled(place):
    (place / "run" / "sft" / "COMPLETE").unlink()
    with pytest.raises(InputError, match="sft: got no model, or half of one"):
        do(place, only="resample", **{"respond.seed": 1})


def test_another_runs_policy_counts_by_what_it_is(place):
    other = place / "other"
    shutil.copytree(place / "run" / "ppo", other / "ppo")
    changes = {"evaluate.policies": ["sft", f"{other}:ppo"]}
    assert do(place, only="evaluate", **changes) == ["evaluate"]
    assert do(place, only="evaluate", **changes) == []
    (other / "ppo" / "generation_config.json").write_text("{}")
    assert do(place, only="evaluate", **changes) == ["evaluate"]


def test_matches_without_a_result_are_told(place):
    write_jsonl(place / "judge.jsonl", [{"match": "", "fault": "refused"}])
    changes = {"evaluate.seed": 7, "label.max_fault_rate": 1.0, "evaluate.limit": 2}
    shutil.rmtree(place / "run" / "journal")  # nothing that was answered before
    do(place, only="evaluate", **changes)
    run = opened(place)
    assert run.state("evaluate")["matches"][0]["win_rate"]["mean"] is None
    assert "wins are against sft" in "\n".join(run_lines(run, {}))
    assert "has no result against sft" in "\n".join(status_lines(status(run)))


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_and_pays_once(fresh):
    run, kills = fresh / "run", 0
    for seconds in (2.5, 4, 6, 8, 10, 13, 16, 20, None):
        process = subprocess.Popen(
            [*AIF, "run", str(run), "--until", "ppo", "--quiet"], start_new_session=True
        )
        try:
            assert process.wait(seconds and seconds * slowdown()) == 0
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills
    names = [f"{name}.jsonl" for name in ("responses", "revisions", "resampled", "labels")]
    killed = [(run / name).read_bytes() for name in names]
    for stage in ("respond", "revise", "resample", "label"):
        ids = [row["id"] for row in read_jsonl(run / "journal" / f"{stage}.jsonl")]
        assert len(ids) == len(set(ids)), f"{stage} paid twice"
    run.rename(fresh / "killed")
    run.mkdir()
    (run / "run.toml").write_bytes((fresh / "killed" / "run.toml").read_bytes())
    do(fresh, until="label")
    assert [(run / name).read_bytes() for name in names] == killed


def test_every_file_that_a_stage_reads_is_written_before_it():
    written: set[str] = {"human.jsonl", "audit.json"}  # which other verbs write
    for stage in STAGES:
        reads = set(stage.reads.split()) - {"*"}
        # `label` takes the comparisons of a file as well as those of a stage.
        assert reads <= written, f"{stage.name} reads {reads - written}"
        written |= set(stage.writes.split())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.parent.name)
def test_shipped_runs_are_valid_and_can_be_planned(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    run = Run(path.parent, load_settings(path, {"judge.check_model": False}))
    names = [step.name for step in steps(run)]
    assert "label" in names
    summary = plan(run)
    assert summary["comparisons"] + summary["calls_kept"] > 0
    json.dumps(summary)


def test_there_are_three_shipped_runs():
    assert {path.parent.name for path in SHIPPED} >= {"demo", "hh-local", "summaries-api"}
