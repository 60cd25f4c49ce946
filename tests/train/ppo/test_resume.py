"""PPO stopped, killed and started again: the same bits, once, and anew where it must be."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import signal
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file

from aif.errors import Interrupted
from aif.train.ppo.train import ppo
from tests.conftest import read_jsonl
from tests.support.child import train_until
from tests.support.ppo import one_thread
from tests.support.tiny import Said, flip
from tests.support.toy import ANEW, toy_run

STEPS = {"max_steps": 6, "batch_size": 8, "save_every": 2, "kl_coef": 0.1, "minibatches": 2}
STEPS |= {"kl_target": 1.0, "kl_horizon": 100, "scale_scores": True, "score_clip": 2.0}
STEPS |= {"eval_fraction": 0.25, "eval_every": 3}


quickly = pytest.fixture(scope="module", autouse=True)(one_thread)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, model) -> Path:
    """A run that nothing stopped."""
    run = toy_run(tmp_path_factory.mktemp("runs") / "run", model, **STEPS)
    assert ppo(run, Said())["steps"] == 6
    return run.path


def noted(run: Path) -> list:
    """Every number on the way but the clock's, and every sample."""
    rows = read_jsonl(run / "metrics.jsonl")
    return [
        [row for row in rows if not row["name"].startswith(("time/", "objective/scores/"))],
        read_jsonl(run / "ppo-samples.jsonl"),
    ]


def same_end(run: Path, straight: Path) -> None:
    """Equal to the bit: policy, critic, metrics, samples."""
    for name in ("ppo", "ppo-critic"):
        ours, theirs = (load_file(r / name / "model.safetensors") for r in (run, straight))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert noted(run) == noted(straight)


@pytest.mark.parametrize(("stop_at", "number"), [(1, signal.SIGINT), (5, signal.SIGTERM)])
def test_interrupted_it_goes_on_to_the_same_bits(tmp_path, model, straight, stop_at, number):
    run = toy_run(tmp_path / "run", model, **STEPS)
    with pytest.raises(Interrupted, match=f"interrupted at step {stop_at} of 6; the same"):
        ppo(run, Said(stop_at, number))
    assert not (run.path / "ppo").exists()
    assert ppo(run, Said())["resumed_from"] == stop_at
    same_end(run.path, straight)


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_bits(tmp_path, model, straight):
    stage, make_run = "aif.train.ppo.train:ppo", "tests.support.toy:toy_run"
    code = train_until(5, signal.SIGKILL, stage, make_run, tmp_path / "run", model, **STEPS)
    assert code == -signal.SIGKILL
    resumed = ppo(toy_run(tmp_path / "run", model, **STEPS), Said())["resumed_from"]
    assert 4 <= resumed < 6
    same_end(tmp_path / "run", straight)


@pytest.mark.parametrize("name", ["optimizer.bin", "custom_checkpoint_1.pkl", "COMPLETE"])
def test_from_an_older_checkpoint_it_comes_to_the_same_bits(tmp_path, model, straight, name):
    run = toy_run(tmp_path / "run", model, **STEPS)
    with pytest.raises(Interrupted):
        ppo(run, Said(5))
    newest = run.path / "checkpoints" / "ppo" / "checkpoint-5"
    if name == "COMPLETE":  # killed while it was being saved
        (newest / name).unlink()
    else:
        flip(newest / name)
    progress = Said()
    assert ppo(run, progress)["resumed_from"] == 4
    assert any("checkpoint-5: not resumed from: " in line for line in progress.lines)
    same_end(run.path, straight)


def test_with_adapters_it_goes_on_to_the_same_bits(tmp_path, model):
    options = STEPS | {"lora": {"rank": 4}, "max_steps": 4}
    ppo(toy_run(tmp_path / "straight", model, **options), Said())
    run = toy_run(tmp_path / "run", model, **options)
    with pytest.raises(Interrupted):
        ppo(run, Said(3))
    kept = load_file(run.path / "checkpoints" / "ppo" / "checkpoint-3" / "model.safetensors")
    # Adapters and the critic's new head; the models under them are as they were read.
    assert all("lora_" in name or ".score." in name for name in kept)
    assert ppo(run, Said())["resumed_from"] == 3
    same_end(run.path, tmp_path / "straight")


def test_with_prompts_run_once_it_goes_on_to_the_same_bits(tmp_path, model):
    options = STEPS | {"samples": 4, "batch_size": 3, "max_steps": 3, "share_prompt": True}
    ppo(toy_run(tmp_path / "straight", model, **options), Said())
    run = toy_run(tmp_path / "run", model, **options)
    with pytest.raises(Interrupted):
        ppo(run, Said(1))
    assert ppo(run, Said())["resumed_from"] == 1
    same_end(run.path, tmp_path / "straight")


def test_a_finished_run_does_nothing_more(straight, model, monkeypatch):
    monkeypatch.setattr("aif.train.ppo.train.build", lambda *_: pytest.fail("it trains"))
    progress = Said()
    summary = ppo(toy_run(straight, model, **STEPS), progress)
    assert progress.lines == [f"{straight}/ppo: done already, of the same data, settings and model"]
    assert summary["steps"] == 6


def test_how_it_is_computed_is_no_reason_to_train_again(straight, model, monkeypatch):
    monkeypatch.setattr("aif.train.ppo.train.build", lambda *_: pytest.fail("it trains"))
    free = {"micro_tokens": 64, "save_every": 1, "keep_checkpoints": 5}
    assert ppo(toy_run(straight, model, **STEPS | free), Said())["steps"] == 6


def test_an_edited_reward_makes_it_anew(tmp_path, model):
    options = STEPS | {"max_steps": 2}
    ppo(toy_run(tmp_path / "run", model, **options), Said())
    run = toy_run(tmp_path / "run", model, **options)
    path = tmp_path / "run" / "rewards.py"
    path.write_text(path.read_text().replace("/ 8", "/ 4"))
    progress = Said()
    assert ppo(run, progress)["resumed_from"] == 0
    assert progress.lines[0] == ANEW


def test_an_edited_gold_makes_it_anew(tmp_path, model):
    """It decides where training stops and which weights are kept."""
    gold = {"max_steps": 2, "gold": f"{tmp_path}/gold.py:gold"}
    path = tmp_path / "gold.py"
    path.write_text("def gold(prompts, texts):\n    return [0.0 for _ in texts]\n")
    ppo(toy_run(tmp_path / "run", model, **STEPS | gold), Said())
    path.write_text("def gold(prompts, texts):\n    return [1.0 for _ in texts]\n")
    progress = Said()
    ppo(toy_run(tmp_path / "run", model, **STEPS | gold), progress)
    assert progress.lines[0] == ANEW


def test_another_setting_makes_it_anew(tmp_path, model):
    options = STEPS | {"max_steps": 2}
    run = toy_run(tmp_path / "run", model, **options)
    ppo(run, Said())
    progress = Said()
    summary = ppo(toy_run(tmp_path / "run", model, **options | {"kl_coef": 0.2}), progress)
    assert progress.lines[0] == ANEW
    assert summary["resumed_from"] == 0
