"""Training in two processes, as torchrun starts them: as in one, and written once."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file

from aif.run import Run
from tests.conftest import aif, read_jsonl, write_jsonl
from tests.support.clock import wait_for
from tests.support.tiny import demonstrations, reward_run, save_tiny, tiny_run
from tests.support.toy import save_toy, toy_run

pytestmark = pytest.mark.slow  # ppo/test_update.py has two processes that are quick
# What `accelerate launch` calls; it starts several processes on CPUs by MPI alone.
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TWO += ["--module", "aif"]
QUICKLY = os.environ | {"OMP_NUM_THREADS": "1"}
CONSTITUTION = 'name = "x"\n[[principle]]\nid = "kind"\ngrade = "Is it kind?"\ncue = "Kind"\n'
RULES = [
    {"match": r"\[response [^\]]*\]\n[^\[]*\ba\b", "logprobs": {"Yes": -0.5, "No": -2.0}},
    {"match": ".", "logprobs": {"Yes": -2.0, "No": -1.0}},
]
PPO = {"max_steps": 4, "batch_size": 4, "samples": 2, "minibatches": 1, "ppo_epochs": 2}
PPO |= {"kl_coef": 0.1, "kl_target": 1.0, "kl_horizon": 100, "scale_scores": True}
PPO |= {"eval_fraction": 0.2, "eval_every": 2, "save_every": 2, "gold": "judge"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return save_toy(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", attention_dropout=0.0)


def in_two(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"capture_output": True, "text": True, "env": QUICKLY} | options
    return subprocess.run([*TWO, *map(str, arguments)], check=False, **options)


def asked_to(run: Run, judged: bool = False) -> Path:
    """The run's folder, its settings in run.toml."""
    if judged:
        constitution = run.path.parent / "c.toml"
        constitution.write_text(CONSTITUTION)
        rules = write_jsonl(run.path.parent / "rules.jsonl", RULES)
        tables = {
            "judge": run.settings.judge.model_copy(update={"model": f"scripted:{rules}"}),
            "label": run.settings.label.model_copy(
                update={"constitution": str(constitution), "protocol": "pointwise"}
            ),
        }
        run.settings = run.settings.model_copy(update=tables)
    run.path.mkdir(exist_ok=True)
    run.keep_settings()
    return run.path


def same(one: Path, two: Path, models: list[str]) -> None:
    """They differ by the order of sums alone."""
    for name in models:
        ours, theirs = (load_file(run / name / "model.safetensors") for run in (two, one))
        assert ours.keys() == theirs.keys()
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4)
    ours, theirs = (metrics(run) for run in (two, one))
    assert ours.keys() == theirs.keys()
    assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-3)


def metrics(run: Path) -> dict[tuple[str, int, str], float]:
    rows = read_jsonl(run / "metrics.jsonl")
    values = {(r["stage"], r["step"], r["name"]): r["value"] for r in rows}
    assert len(values) == len(rows)  # written by one of them
    # Clocks; what is a mean of each process's own figure; a variance that is all rounding.
    others = ("time/", "objective/scores/", "val/explained", "val/ratio_var")
    return {key: value for key, value in values.items() if not key[2].startswith(others)}


def test_ppo_learns_the_same_and_its_judge_is_paid_once(tmp_path, toy):
    reward = {"judge": 1.0, f"{tmp_path}/one/rewards.py:share": 0.5}
    one, two = (
        asked_to(toy_run(tmp_path / name, toy, reward, **PPO), judged=True)
        for name in ("one", "two")
    )
    alone, together = aif("ppo", one, env=QUICKLY), in_two("ppo", two)
    assert alone.returncode == together.returncode == 0, together.stderr[-3000:]
    assert together.stdout.replace("/two", "/one") == alone.stdout  # said once
    same(one, two, ["ppo", "ppo-critic"])
    for file, column in (("journal/ppo.jsonl", "id"), ("ppo-samples.jsonl", "response")):
        ours, theirs = ([row[column] for row in read_jsonl(run / file)] for run in (two, one))
        assert sorted(ours) == sorted(theirs)
    again = in_two("ppo", two)
    assert "done already" in again.stderr
    assert again.returncode == 0


def test_stopped_it_goes_on_from_where_both_stood(tmp_path, toy):
    options = PPO | {"max_steps": 120, "save_every": 1000, "gold": None, "eval_fraction": 0.0}
    options |= {"learning_rate": 1e-4}
    run = asked_to(toy_run(tmp_path / "run", toy, **options))
    command = [*TWO, "ppo", str(run)]
    process = subprocess.Popen(
        command, env=QUICKLY, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for((run / "metrics.jsonl").exists, 400)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does on Ctrl-C
    _, stderr = process.communicate()
    assert process.returncode
    (kept,) = (run / "checkpoints" / "ppo").glob("checkpoint-*/COMPLETE")
    step = int(kept.parent.name.partition("-")[2])
    assert 0 < step < 120
    assert stderr.count(f"aif: interrupted at step {step} of 120; the same command resumes") == 1
    done = in_two("ppo", run, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f'"resumed_from": {step}' in done.stdout


def test_what_does_not_divide_is_said_before_the_first_step(tmp_path, toy):
    run = asked_to(toy_run(tmp_path / "run", toy, **PPO | {"batch_size": 3, "gold": None}))
    done = in_two("ppo", run)
    assert done.returncode
    line = "aif: ppo: batch_size: got 3, expected a multiple of 2, the processes"
    assert done.stderr.count(line) == 1
    assert not (run / "metrics.jsonl").exists()


def test_sft_learns_the_same(tmp_path, tiny):
    data = demonstrations(tmp_path / "data.jsonl")
    options = {"epochs": 2.0, "eval_fraction": 0.2, "batch_size": 8, "micro_tokens": 64}
    one, two = (
        asked_to(tiny_run(tmp_path / name, tiny, {str(data): 1.0}, **options))
        for name in ("one", "two")
    )
    alone, together = aif("sft", one, env=QUICKLY), in_two("sft", two)
    assert alone.returncode == together.returncode == 0, together.stderr[-3000:]
    same(one, two, ["sft"])


def test_reward_models_learn_the_same(tmp_path, tiny):
    options = {"epochs": 1.0, "members": 2, "curve": [0.5], "micro_tokens": 128, "head": "fitted"}
    one, two = (asked_to(reward_run(tmp_path / name, tiny, **options)) for name in ("one", "two"))
    alone, together = aif("reward", one, env=QUICKLY), in_two("reward", two)
    assert alone.returncode == together.returncode == 0, together.stderr[-3000:]
    same(one, two, ["reward", "reward-2"])
    assert (two / "reward-card.json").exists()
