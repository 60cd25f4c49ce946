"""The README's commands, run as they stand."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aif.config.settings import LoraSettings, PolicySettings, Settings
from tests.support.server import serving

ROOT = Path(__file__).parents[1]


def commands(title: str) -> list[str]:
    """The lines of the console blocks under a heading."""
    readme = (ROOT / "README.md").read_text("utf-8")
    _, level, rest = re.split(rf"^(#+) {title}\n", readme, maxsplit=1, flags=re.MULTILINE)
    # The next heading of its level or above; one "#" may be a comment in a block as well.
    ends = rf"^#{{{min(2, len(level))},{len(level)}}} "
    section = re.split(ends, rest, maxsplit=1, flags=re.MULTILINE)[0]
    blocks = re.findall(r"```console\n(.*?)```", section, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A place that looks like the checkout, as far as the commands see it."""
    place = tmp_path_factory.mktemp("checkout")
    for name in ("constitutions", "prompts"):
        shutil.copytree(ROOT / name, place / name)
    return place


def run(line: str, folder: Path) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        line, shell=True, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.timeout(900)  # some twenty commands, of which most load a model
def test_the_three_daily_jobs(folder):
    batch, edit, swap = (
        commands(title) for title in ("Run a batch", "Edit a constitution", "Swap a judge")
    )
    plan, label, status, export = (run(line, folder) for line in batch)
    assert "96 calls to make" in plan
    assert "96 calls made" in label
    assert "next: aif export runs/first" in status
    assert "12 rows" in export

    _, copied, _, check, planned, edited = (run(line, folder) for line in edit)
    assert "0 calls made, 96 kept" in copied
    assert "4 principles, ok" in check
    assert "24 calls to make, 72 answers kept" in planned
    assert "good-cheer' was edited" in edited
    assert "24 calls made, 72 kept" in edited

    cost, back, _, before, flips = (run(line, folder) for line in commands("See what flips"))
    assert "pointwise, as text: good-cheer (every comparison)" in cost
    assert "principle 'good-cheer' was edited" in back
    assert "12 comparisons in both" in back
    assert "0 calls made, 96 kept" in before
    assert "principle 'good-cheer' was edited" in flips
    assert "runs/first/diff.jsonl" in flips

    with serving() as server:
        there = swap[0].replace("http://localhost:8000/v1", server.base_url)
        swapped = run(there.replace("MODEL", "test-model"), folder)
    assert "judge changed" in swapped
    back = run(swap[1], folder)
    assert "0 calls made, 96 kept" in back
    several = commands("Several judges")
    with serving() as server:
        there = [line.replace("http://localhost:8000/v1", server.base_url) for line in several]
        panel, adaptive, back = (run(line.replace("MODEL", "test-model"), folder) for line in there)
    assert "judge 'openai:test-model' joined" in panel
    assert "openai:test-model: 12 labels" in panel
    assert "0 calls made" in adaptive
    assert "got more than the cheap pass" in adaptive
    assert "0 calls made, 96 kept" in back


def test_which_judge_to_trust(folder):
    run(commands("Run a batch")[1], folder)
    own, asked = (run(line, folder) for line in commands("Which judge to trust"))
    assert "12 pairs, 12 with a choice of people" in own
    assert "runs/first/audit.json" in own
    assert "canary order" in asked
    assert "runs/audit/audit.json" in asked


def test_critique_revise_fine_tune(folder):
    """As it stands but for its size: fewer prompts, shorter texts, one step."""
    lines = commands("Critique, revise, fine-tune")
    small = ("--limit 30", "--limit 8"), ("policy.max_tokens=64", "policy.max_tokens=24")
    for line, (old, new) in zip([lines[0]] * 2, small, strict=True):
        assert old in line
        lines[0] = lines[0].replace(old, new)
    respond, revise, keep, sft, after = (run(line, folder) for line in lines)
    assert "8 responses to 8 prompts" in respond
    assert "of 8 responses (by round: " in revise
    assert "revisions kept" in keep
    assert "runs/sl/sft" in sft
    assert "10 responses to 5 prompts (0 faults)" in after


@pytest.mark.timeout(900)
def test_reward_model_and_ppo(folder):
    """On the example pairs, labelled as the first of the daily jobs has it; PPO with one step."""
    run(commands("Run a batch")[1], folder)
    reward, score = (run(line, folder) for line in commands("Reward model"))
    assert "runs/first/reward" in reward
    assert "12 pairs scored" in score
    (line,) = commands("PPO")
    assert "ppo.max_steps=2" in line
    small = line.replace("max_steps=2", "max_steps=1") + " --set ppo.eval_fraction=0.03"
    ppo = run(small, folder)
    assert "1 steps of ppo on " in ppo
    assert "held out, scores: " in ppo
    assert "runs/first/ppo" in ppo
    (line,) = commands("Evaluate")
    assert "--limit 6" in line
    evaluated = run(line.replace("--limit 6", "--limit 2"), folder)
    assert "wins are against base" in evaluated
    assert "runs/first/evaluate.json" in evaluated


# So that the demo, which is made to be watched, takes a minute.
SMALL = ["respond.limit=6", "respond.resamples=2", "policy.max_tokens=8", "revise.limit=3"]
SMALL += ["sft.max_steps=1", "sft.filtered=false", "sft.data={responses=1.0}"]
SMALL += ["reward.max_steps=1", "ppo.max_steps=1"]
SMALL += ["ppo.batch_size=2", "ppo.samples=2", "evaluate.limit=3"]


@pytest.mark.timeout(900)
def test_one_command(folder):
    """As it stands but for its size."""
    plan, *runs, status = commands("One command")
    (folder / "runs" / "demo").mkdir(parents=True)
    shutil.copy(ROOT / "runs/demo/run.toml", folder / "runs/demo/run.toml")
    assert "resample: 512 calls at most" in run(plan, folder)
    small = " ".join(f"--set '{setting}'" for setting in SMALL)
    first, again = (run(f"{line} {small}", folder) for line in runs)
    assert "wins are against sft" in first
    assert "report.html" in first
    assert "reward: data, settings or model have changed" in again
    assert "label" not in again
    assert "ppo wins" in run(status, folder)


def test_the_two_commands_are_in_the_makefile():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in commands("aif"):
        if line.startswith("make "):
            assert line.split()[1] in targets


def test_every_setting_is_in_the_table():
    readme = (ROOT / "README.md").read_text("utf-8")
    tables = readme[readme.index("| table | keys |") :].partition("\n\n")[0].splitlines()[2:]
    listed: dict[str, set[str]] = {}
    for line in tables:
        names, keys = line.split("|")[1:3]
        for name in re.findall(r"\[(\w+)\]", names):
            listed.setdefault(name, set()).update(re.findall(r"`([a-z_0-9.]+)`", keys))
    listed["reviser"] = listed["policy"]
    for name in Settings.model_fields:
        table = getattr(Settings(), name) or PolicySettings()
        keys = set(type(table).model_fields) - {"lora"}
        if "lora" in type(table).model_fields:
            keys |= {f"lora.{key}" for key in LoraSettings.model_fields}
        assert listed[name] == keys, name
