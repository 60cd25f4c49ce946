"""PPO with a live judge as reward and as gold: journalled, paid once, stopped and gone on with."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from aif.errors import InputError, JudgeStopped
from aif.judge import live
from aif.llm import Answer
from aif.llm.scripted import ScriptedLLM, words
from aif.stages.ppo import ppo
from tests.conftest import read_jsonl
from tests.support.tiny import Said
from tests.support.toy import ANEW, of_step, toy_run


class Counting:
    """A judge to whom a response is as good as it has words `a`; it may be gone after some calls.

    `graded` are the responses that it graded.
    """

    def __init__(self, monkeypatch):
        self.graded: list[str] = []
        self.gone_after = 10**9
        monkeypatch.setattr(live, "open_llm", lambda settings: ScriptedLLM(self.reply))

    def reply(self, ask) -> Answer:
        if len(self.graded) >= self.gone_after:
            raise JudgeStopped("the judge is gone")
        response = words(ask).partition("[response ")[2].partition("]\n")[2].partition("\n[")[0]
        self.graded.append(response)
        count = float(response.split().count("a"))
        return Answer("", logprobs={"Yes": -1.0, "No": -1.0 - count})


@pytest.fixture
def judge(monkeypatch) -> Counting:
    return Counting(monkeypatch)


def judged_run(path: Path, model: Path, reward="judge", **options):
    options = {"max_steps": 4, "batch_size": 4, "save_every": 2} | options
    run = toy_run(path, model, {reward: 1.0} if reward == "judge" else reward, **options)
    (path / "c.toml").write_text(
        'name = "x"\n[[principle]]\nid = "kind"\ngrade = "Is it kind?"\ncue = "Kind"\n'
    )
    tables = {
        "judge": run.settings.judge.model_copy(update={"model": "scripted:x"}),
        "label": run.settings.label.model_copy(
            update={"constitution": str(path / "c.toml"), "protocol": "pointwise"}
        ),
    }
    run.settings = run.settings.model_copy(update=tables)
    return run


def test_a_live_judge_is_a_reward_that_is_learned_from(tmp_path, model, judge):
    run = judged_run(tmp_path / "run", model, max_steps=15, batch_size=32)
    summary = ppo(run, Said())
    assert summary["last"]["objective/scores"] > summary["first"]["objective/scores"] + 2
    assert summary["judge_calls"] == len(judge.graded)
    rows = read_jsonl(run.path / "journal" / "ppo.jsonl")
    assert len(rows) == len(judge.graded)


def test_no_grade_is_paid_for_twice_and_a_judge_that_comes_back_is_gone_on_with(
    tmp_path, model, judge
):
    straight = judged_run(tmp_path / "straight", model)
    ppo(straight, Said())
    every = list(judge.graded)
    judge.graded.clear()
    judge.gone_after = len(every) - 1  # in the last step
    run = judged_run(tmp_path / "run", model)
    with pytest.raises(JudgeStopped, match="the judge is gone"):
        ppo(run, Said())
    judge.gone_after = 10**9
    assert ppo(run, Said())["resumed_from"] == 3
    assert sorted(judge.graded) == sorted(every)
    for name in ("objective/scores", "objective/kl", "loss/value_avg"):
        assert of_step(run, name) == of_step(straight, name)


def test_the_judge_may_be_the_gold_of_another_reward(tmp_path, model, judge):
    run = judged_run(tmp_path / "run", model, "share", gold="judge", eval_fraction=0.25)
    summary = ppo(run, Said())
    assert summary["eval_after"]["eval/gold"] == pytest.approx(
        8 * summary["eval_after"]["eval/scores"], abs=1e-5
    )
    first = json.loads((run.path / "ppo-samples.jsonl").open().readline())
    assert first["gold"] == pytest.approx(8 * first["score"], abs=1e-5)


def test_a_judge_that_compares_cannot_grade(tmp_path, model, judge):
    run = judged_run(tmp_path / "run", model)
    label = run.settings.label.model_copy(update={"protocol": "pairwise"})
    run.settings = run.settings.model_copy(update={"label": label})
    with pytest.raises(InputError, match="'pointwise' or 'rating', as a live judge grades"):
        ppo(run, Said())


def test_an_edited_constitution_makes_it_anew(tmp_path, model, judge):
    run = judged_run(tmp_path / "run", model, max_steps=1)
    ppo(run, Said())
    path = run.path / "c.toml"
    path.write_text(path.read_text().replace("kind?", "very kind?"))
    progress = Said()
    ppo(run, progress)
    assert progress.lines[0] == ANEW
