"""Preference data as it is found: every shape, and what happens to a row that has none."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aif.config.settings import LabelSettings, LLMSettings
from aif.constitution import file as constitution
from aif.data.readers import pairs_of, read_pairs, read_prompts, unique
from aif.errors import AifError, InputError
from aif.judge.judge import Judge

HI = [{"role": "user", "content": "Hi"}]
QUESTION = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


SHAPES = {
    "response_a": {"prompt": "Hi", "response_a": "x", "response_b": "y"},
    "response_1": {"prompt": "Hi", "response_1": "x", "response_2": "y"},
    "llmbar": {"prompt": "Hi", "output_1": "x", "output_2": "y", "label": 1},
    "pandalm": {"instruction": "Hi", "input": "", "response1": "x", "response2": "y"},
    "messages": {"prompt": HI, "response_a": answer("x"), "response_b": {"content": "y"}},
    "chosen": {"prompt": "Hi", "chosen": "x", "rejected": "y"},
    "hh": {
        "chosen": "\n\nHuman: Hi\n\nAssistant: x",
        "rejected": "\n\nHuman: Hi\n\nAssistant: y",
    },
    "hh with prompt": {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "x", "rejected": "y"},
    "ultrafeedback binarized": {
        "prompt": "Hi",
        "messages": HI + answer("x"),
        "chosen": HI + answer("x"),
        "rejected": HI + answer("y"),
        "score_chosen": 9.0,
    },
    "ultrafeedback": {
        "instruction": "Hi",
        "completions": [
            {"response": "y", "overall_score": 3.0},
            {"response": "x", "overall_score": 8.5},
        ],
    },
    "trl": {"prompt": HI, "chosen": answer("x"), "rejected": answer("y")},
    "trl implicit": {"chosen": HI + answer("x"), "rejected": HI + answer("y")},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "x"},
        "rejected": {"from": "gpt", "value": "y"},
    },
    "scores": {"prompt": "Hi", "responses": ["y", "x"], "scores": [1, 2]},
    "ranks": {"prompt": "Hi", "responses": ["x", "y"], "ranks": [1, 2]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_comparison(shape):
    (pair,) = pairs_of(SHAPES[shape], "row")
    row = pair.comparison
    assert row.prompt == HI
    assert {row.first, row.second} == {"x", "y"}
    human = shape not in ("response_a", "response_1", "llmbar", "pandalm", "messages")
    assert (pair.human is not None) == human
    if human:  # x is the better one in each of these
        assert pair.human.p_first == (1.0 if row.first == "x" else 0.0)
        assert pair.human.comparison_id == row.id


def test_a_dialogue_becomes_its_turns():
    text = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
    (pair,) = pairs_of({"prompt": text, "response_a": "x", "response_b": "y"}, "row")
    assert pair.comparison.prompt == QUESTION
    (pair,) = pairs_of({"chosen": text + " x", "rejected": text + " y"}, "row")
    assert pair.comparison.prompt == QUESTION
    plain = "About \n\nHuman: rights"
    (pair,) = pairs_of({"prompt": plain, "response_a": "x", "response_b": "y"}, "row")
    assert pair.comparison.prompt == [{"role": "user", "content": plain}]


def test_instruction_and_input_are_one_prompt():
    row = {"instruction": "Sum up.", "input": "Text", "response1": "x", "response2": "y"}
    (pair,) = pairs_of(row, "row")
    assert pair.comparison.prompt == [{"role": "user", "content": "Sum up.\n\nText"}]


def test_k_responses_are_compared_each_with_each():
    row = {"prompt": "Hi", "responses": ["x", "y", "z"], "scores": [1, 3, 3]}
    pairs = list(pairs_of(row, "row"))
    winners = {}
    for pair in pairs:
        texts = (pair.comparison.first, pair.comparison.second)
        winner = pair.human and (texts[0] if pair.human.p_first == 1 else texts[1])
        winners["".join(sorted(texts))] = winner
    assert winners == {"xy": "y", "xz": "z", "yz": None}
    assert [p.human for p in pairs_of({"prompt": "Hi", "responses": ["x", "y"]}, "row")] == [None]


TEXT = st.text(max_size=20)


@given(TEXT, TEXT, TEXT)
@settings(max_examples=50, deadline=None)
def test_the_humans_choice_decides_nothing(prompt, one, other):
    """Neither the comparison nor a byte of any call tells what the human chose."""
    pairs = {}
    for chosen, rejected in ((one, other), (other, one)):
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        (pairs[chosen, rejected],) = pairs_of(row, "row")
        ranked = {"prompt": prompt, "responses": [chosen, rejected], "ranks": [1, 2]}
        (again,) = pairs_of(ranked, "row")
        assert again.comparison == pairs[chosen, rejected].comparison
    rows = [pair.comparison for pair in pairs.values()]
    assert rows[0] == rows[-1]
    if one != other:
        assert sum(pair.human.p_first for pair in pairs.values()) == 1
    for judge in JUDGES:
        calls = [[judge.ask(call, c) for call in judge.calls_for(c)] for c in rows]
        assert calls[0] == calls[-1]


JUDGES = [
    Judge(
        constitution.Constitution.model_validate(
            {"name": "x", "principle": [{"id": "a", "compare": "Which?", "grade": "Is it?"}]}
        ),
        LLMSettings(model="scripted:none", form=form),
        LabelSettings(protocol=protocol),
    )
    for protocol in ("pairwise", "pointwise")
    for form in ("chat", "text")
]


def test_the_order_of_chosen_and_rejected_is_about_even():
    rows = [{"prompt": "Hi", "chosen": f"x{n}", "rejected": f"y{n}"} for n in range(400)]
    first = sum(next(pairs_of(row, "row")).human.p_first for row in rows)
    assert 150 < first < 250


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({}, "got keys none, expected response_a and response_b, chosen and rejected, or"),
        ({"prompt": "Hi", "chosen": "x"}, "got keys chosen, prompt"),
        ({"response_a": "x", "response_b": "y"}, "prompt: got nothing"),
        ({"prompt": 3, "response_a": "x", "response_b": "y"}, "prompt: got 3"),
        ({"prompt": [], "response_a": "x", "response_b": "y"}, "prompt: got []"),
        ({"prompt": "Hi", "response_a": None, "response_b": "y"}, "response_a: got None"),
        ({"prompt": "Hi", "response_a": "x", "response_b": 5}, "response_b: got 5"),
        (
            {"prompt": [{"role": "tool", "content": "x"}], "chosen": "x", "rejected": "y"},
            "prompt.0",
        ),
        ({"prompt": "Hi", "responses": ["x"]}, "responses: got ['x'], expected a list of 2 to 64"),
        ({"prompt": "Hi", "responses": "xy"}, "responses: got 'xy'"),
        ({"prompt": "Hi", "responses": ["x"] * 65}, "responses: got ["),
        ({"prompt": "Hi", "responses": ["x", "y"], "scores": [1]}, "scores: got [1]"),
        ({"prompt": "Hi", "responses": ["x", "y"], "scores": [1, "2"]}, "scores: got [1, '2']"),
        ({"prompt": "Hi", "responses": ["x", None]}, "responses.1: got None"),
        ({"chosen": "no dialogue", "rejected": "at all"}, "chosen: got texts without a common"),
        (
            {"chosen": HI + answer("x"), "rejected": QUESTION + answer("y")},
            "chosen: got conversations",
        ),
    ],
)
def test_a_bad_row_is_one_line_with_file_line_and_key(tmp_path, row, error):
    file = tmp_path / "pairs.jsonl"
    good = {"prompt": "Hi", "response_a": "x", "response_b": "y"}
    file.write_text(json.dumps(good) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError) as raised:
        list(read_pairs(str(file)))
    assert str(raised.value).startswith(f"{file}:3: {error}")
    assert "\n" not in str(raised.value)


def test_a_score_that_is_no_number_is_not_a_preference():
    row = {"prompt": "Hi", "responses": ["x", "y"], "scores": [float("nan"), 1]}
    with pytest.raises(InputError, match="scores"):
        list(pairs_of(row, "row"))
    rated = [{"response": "x", "overall_score": float("nan")}, {"response": "y"}]
    (pair,) = pairs_of({"prompt": "Hi", "completions": rated}, "row")
    assert pair.human is None


def test_the_id_is_of_prompt_first_and_second():
    base = {"prompt": "Hi", "response_a": "x", "response_b": "y"}
    changes = [{}, {"prompt": "Bye"}, {"response_a": "z"}, {"response_b": "z"}]
    changes += [{"response_a": "y", "response_b": "x"}, {"prompt": [*QUESTION]}]
    ids = [pair.comparison.id for change in changes for pair in pairs_of(base | change, "row")]
    assert len(set(ids)) == len(changes)
    same = {"id": "7", "source": "elsewhere", "label": 1}
    assert next(pairs_of(base | same, "row")).comparison.id == ids[0]


def test_rows_that_repeat_are_marked():
    rows = [SHAPES["chosen"], SHAPES["trl"], SHAPES["scores"]]
    pairs = (pair for row in rows for pair in pairs_of(row, "row"))
    assert [new for _, new in unique(pairs)] == [True, False, False]


def test_a_local_datasets_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = ("chosen", "trl", "trl implicit")
    for name in names:
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        table = datasets.Dataset.from_list([SHAPES[name] | {"id": "7"}])
        table.to_parquet(str(folder / "train-00000.parquet"))
        (pair,) = read_pairs(f"hf:{folder}")
        assert {pair.comparison.first, pair.comparison.second} == {"x", "y"}
        assert pair.human.source == "7"
    with pytest.raises(AifError, match="datasets could not load it") as error:
        list(read_pairs(f"hf:{folder}:test"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["harmless_base", "helpful_online", "helpful_rejection_sampled"])
def test_hh_files(shared_data, name):
    """Dialogues become turns; in three of the harmless ones the assistant speaks twice in a row."""
    path = shared_data / "hh" / f"{name}.jsonl"
    pairs = list(read_pairs(str(path)))
    assert len(pairs) == len(path.read_bytes().splitlines())
    twice = 0
    for pair in pairs:
        roles = [message["role"] for message in pair.comparison.prompt]
        assert roles[0] == roles[-1] == "user"
        twice += roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert not any("\n\nAssistant:" in m["content"] for m in pair.comparison.prompt)
    assert twice == (3 if name == "harmless_base" else 0)


def test_sharegpt_file(shared_data):
    pairs = list(read_pairs(str(shared_data / "preference_demo" / "dpo_en.jsonl")))
    assert len(pairs) == 300
    prompts = [pair.comparison.prompt for pair in pairs]
    assert sum(prompt[0]["role"] == "system" for prompt in prompts) == 80
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)


def test_pandalm_and_llmbar_files(shared_data):
    pairs = list(read_pairs(str(shared_data / "pandalm" / "testset.jsonl")))
    assert len(pairs) == 999
    assert pairs[157].comparison.first == "True"  # a JSON true in the file
    pairs = list(read_pairs(str(shared_data / "llmbar" / "natural.jsonl")))
    assert len(pairs) == 100
    assert all(pair.human is None for pair in pairs)


def test_prompt_files(shared_data):
    for name in ("general", "harmless", "helpful", "safety"):
        rows = list(read_prompts(str(shared_data / "prompts" / f"{name}.jsonl")))
        assert len(rows) > 500
        assert all(row.messages[-1]["role"] == "user" and row.source for row in rows)
