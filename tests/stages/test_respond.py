"""Solved examples before every prompt: what the model is asked, and what stays as it was."""

import pytest

from aif.config.settings import load_settings
from aif.errors import InputError
from aif.llm import Answer
from aif.llm.scripted import ScriptedLLM
from aif.progress import Progress
from aif.run import Run
from aif.stages import respond as stage
from aif.store.records import content_id
from tests.conftest import read_jsonl, write_jsonl

HI = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
SHOTS = [
    {"prompt": "1 + 1?", "response": "1 + 1 = 2. The answer is 2."},
    {"prompt": [{"role": "user", "content": "2 + 2?"}], "output": "The answer is 4."},
]
TURNS = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "1 + 1 = 2. The answer is 2."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "The answer is 4."},
]


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """Samples the prompts "Hi" and "Hi" under a system message; returns (asks, run)."""

    def sampled(reply=lambda ask: "ok", **settings):
        llm = ScriptedLLM(lambda ask: Answer("", texts=(reply(ask),), finish="length"))
        monkeypatch.setattr(stage, "open_llm", lambda _: llm)
        prompts = [{"prompt": [HI]}, {"prompt": [SYSTEM, HI]}]
        values = {
            "respond.prompts": str(write_jsonl(tmp_path / "prompts.jsonl", prompts)),
            "respond.samples": 1,
            "policy.model": "scripted:rules.jsonl",
        }
        run = Run(tmp_path / "run", load_settings(tmp_path / "none.toml", values | settings))
        stage.respond(run, Progress(quiet=True))
        return llm.asks, run

    return sampled


@pytest.fixture
def shots(tmp_path):
    return {"respond.few_shot": str(write_jsonl(tmp_path / "shots.jsonl", SHOTS))}


def test_in_a_chat_shots_are_turns_after_the_system_message(sample, shots):
    asks, _ = sample(**shots)
    assert [ask.messages for ask in asks] == [[*TURNS, HI], [SYSTEM, *TURNS, HI]]
    assert {ask.text for ask in asks} == {None}


def test_in_text_shots_are_part_of_the_transcript(sample, shots):
    asks, _ = sample(**shots | {"policy.form": "text"})
    solved = (
        "User: 1 + 1?\n\nAssistant: 1 + 1 = 2. The answer is 2.\n\n"
        "User: 2 + 2?\n\nAssistant: The answer is 4.\n\nUser: Hi\n\nAssistant:"
    )
    assert [ask.text for ask in asks] == [solved, f"System: Be brief.\n\n{solved}"]
    assert {ask.messages for ask in asks} == {None}


def test_shots_are_not_kept_with_the_prompts(sample, shots):
    _, run = sample(**shots)
    prompts = read_jsonl(run.path / "prompts.jsonl")
    assert [row["messages"] for row in prompts] == [[HI], [SYSTEM, HI]]
    ids = [row["prompt_id"] for row in read_jsonl(run.path / "responses.jsonl")]
    assert ids == [row["id"] for row in prompts]


def test_without_shots_ids_are_what_they_were(sample):
    asks, run = sample()
    # Literal, so that a run of last year still finds its answers.
    assert asks[0].key == "20668af92b33e37187b20d5f25731c63a90a0aa3c1aa18a9b727b4dbedf7f7d4"
    policy, prompt = run.settings.policy, content_id("prompt", [HI])
    assert asks[0].key == content_id("response", prompt, policy.identity(), "auto", 0, 0)
    assert [ask.messages for ask in asks] == [[HI], [SYSTEM, HI]]


def test_other_shots_are_other_calls_and_the_same_shots_none(sample, shots, tmp_path):
    first, _ = sample()
    with_shots, _ = sample(**shots)
    again, _ = sample(**shots)
    fewer = {"respond.few_shot": str(write_jsonl(tmp_path / "fewer.jsonl", SHOTS[:1]))}
    edited, _ = sample(**fewer)
    back, _ = sample()
    assert (len(again), len(back)) == (0, 0)
    assert len({ask.key for ask in [*first, *with_shots, *edited]}) == 6


def test_what_a_base_model_makes_up_after_its_turn_is_cut(sample, shots):
    answer = " 3. The answer is 3.\n\nUser: 9 + 9?\n\nAssistant: The answer is 18."
    _, run = sample(lambda ask: answer, **shots | {"policy.form": "text"})
    rows = read_jsonl(run.path / "responses.jsonl")
    assert {(row["text"], row["finish"]) for row in rows} == {(" 3. The answer is 3.", "stop")}
    _, run = sample(lambda ask: answer, **shots)  # in a chat it is the model's own
    assert {row["text"] for row in read_jsonl(run.path / "responses.jsonl")} == {answer}


def test_a_turn_of_which_nothing_is_left_is_empty(sample, shots):
    _, run = sample(lambda ask: " \n\nUser: 9 + 9?", **shots | {"policy.form": "text"})
    assert {row["fault"] for row in read_jsonl(run.path / "responses.jsonl")} == {"empty"}
    assert run.state("respond")["faults"] == {"empty": 2}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"response": "x"}, ["response", "a prompt beside it"]),
        ({"prompt": "p"}, ["keys prompt", "response"]),
        ({"prompt": "p", "response": 3}, ["response: got 3", "text"]),
        ({"prompt": "p", "response": " "}, ["empty"]),
        ({"prompt": 3, "response": "x"}, ["prompt: got 3"]),
        ({"prompt": [SYSTEM, HI], "response": "x"}, ["a system message", "in the prompts"]),
    ],
)
def test_a_bad_shot_is_one_line_and_nothing_is_asked(sample, tmp_path, row, named):
    file = write_jsonl(tmp_path / "shots.jsonl", [SHOTS[0], row])
    with pytest.raises(InputError) as error:
        sample(**{"respond.few_shot": str(file)})
    line = str(error.value)
    assert "\n" not in line
    assert all(part in line for part in [f"{file}:2", "got", "expected", *named]), line
    assert not (tmp_path / "run" / "journal").exists()


def test_a_shots_file_that_is_missing_or_empty_is_an_error(sample, tmp_path):
    for name, got in (("gone.jsonl", "no such file"), ("empty.jsonl", "no examples")):
        (tmp_path / "empty.jsonl").touch()
        with pytest.raises(InputError, match=rf"{name}: got {got}"):
            sample(**{"respond.few_shot": str(tmp_path / name)})
