"""Where SFT's examples come from, how often an epoch shows them, and which are held out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from aif.config.settings import Settings
from aif.config.toml import checked
from aif.data.readers import read_dialogues
from aif.errors import AifError, InputError
from aif.run import Run
from aif.store.records import Kept, Prompt, Response, Revision, Vote
from aif.train.examples import Example, held_out, mirror_mixture, read_examples, split
from tests.conftest import write_jsonl

HI = [{"role": "user", "content": "Hi"}]


def run_with(path: Path, **sft) -> Run:
    path.mkdir(exist_ok=True)
    return Run(path, checked(Settings, {"sft": sft}, "test"))


@pytest.fixture
def run(tmp_path: Path):
    """A run of two prompts, three responses (one cut off, one failed) and their revisions."""

    def make(**sft) -> Run:
        run = run_with(tmp_path / "run", **sft)
        prompts = [Prompt.of([{"role": "user", "content": text}]) for text in ("One?", "Two?")]
        run.write("prompts.jsonl", prompts)
        answers = [("a", 0, "A", None), ("b", 1, "B", None), ("c", 1, None, "empty")]
        run.write(
            "responses.jsonl",
            [
                Response(i, prompts[p].id, "m", 0, t, "length" if i == "b" else "stop", fault, {})
                for i, p, t, fault in answers
            ],
        )
        rounds = [("a", 2, "A2", None), ("a", 1, "A1", None), ("a", 3, None, "empty")]
        rounds += [("b", 1, "B1", None), ("b", 2, None, "refused")]
        run.write(
            "revisions.jsonl",
            [
                Revision(f"{i}{n}", i, prompts[i == "b"].id, n, "p", "m", "hm", text, fault, {})
                for i, n, text, fault in rounds
            ],
        )
        run.write("votes.jsonl", [Vote(prompts[0].id, "A", None, 1.0, 1, 1, ["a"])])
        return run

    return make


def answers(run: Run) -> list[str]:
    return [example.messages[-1]["content"] for example in read_examples(run).rows]


@pytest.mark.parametrize(
    ("which", "want"),
    [("all", ["A1", "A2", "B1"]), ("first", ["A1", "B1"]), ("last", ["A2", "B1"])],
)
def test_good_revisions_are_learned_from(run, which, want):
    examples = read_examples(run(revisions=which)).rows
    assert [example.messages[-1]["content"] for example in examples] == want
    assert [m["role"] for m in examples[0].messages] == ["user", "assistant"]
    assert examples[0].messages[0]["content"] == "One?"


def test_filtered_takes_what_the_filter_kept_and_asks_for_it_first(run):
    filtered = run(filtered=True, revisions="last")
    with pytest.raises(AifError, match=r"kept.jsonl: got no such file, .* `aif filter .*run`"):
        read_examples(filtered)
    kept = [
        Kept(f"a{n}", "a", n, "c", p_revision=p, by_principle={}, fault=None, kept=p > 0.5)
        for n, p in [(1, 0.9), (2, 0.1)]
    ]
    filtered.write("kept.jsonl", kept)
    assert answers(filtered) == ["A1"]


def test_responses_and_votes_are_sources_too(run):
    assert answers(run(data={"votes": 1.0})) == ["A"]
    examples = read_examples(run(data={"responses": 1.0})).rows
    assert [(e.messages[-1]["content"], e.ended) for e in examples] == [("A", True), ("B", False)]


def test_a_stage_that_was_not_run_is_named(tmp_path):
    with pytest.raises(AifError, match=r"got no such file, expected what `aif revise .*` makes"):
        read_examples(run_with(tmp_path / "run"))


def test_demonstrations_join_and_duplicates_count_once(run, tmp_path):
    rows = [{"prompt": "Hi", "response": "Hello"}] * 3 + [{"prompt": "Hi", "response": "Hey"}]
    path = str(write_jsonl(tmp_path / "d.jsonl", rows))
    examples = read_examples(run(data={"revisions": 1.0, path: 0.5}))
    assert Counter(e.source for e in examples.rows) == {"revisions": 3, path: 2}
    assert examples.duplicates == {"revisions": 0, path: 2}


def test_plain_texts_are_for_the_lm_objective(run, tmp_path):
    path = str(write_jsonl(tmp_path / "t.jsonl", [{"text": "Once."}, {"text": "Twice."}]))
    examples = read_examples(run(objective="lm", data={path: 1.0})).rows
    assert [e.text for e in examples] == ["Once.", "Twice."]
    with pytest.raises(
        InputError, match=r"^sft: data: got 'revisions', expected JSONL with `text`"
    ):
        read_examples(run(objective="lm"))
    bad = str(write_jsonl(tmp_path / "bad.jsonl", [{"text": "Once."}, {"text": 3}]))
    with pytest.raises(InputError, match=r"bad.jsonl:2: text: got 3, expected a text"):
        read_examples(run(objective="lm", data={bad: 1.0}))


def test_no_example_is_one_clear_line(run, tmp_path):
    empty = tmp_path / "none.jsonl"
    empty.write_text("")
    with pytest.raises(InputError, match=r"none.jsonl: got no examples, expected at least one"):
        read_examples(run(data={str(empty): 1.0}))


TALK = [*HI, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": HI, "completion": [{"role": "assistant", "content": "Hello"}]},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
        {"messages": TALK},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: "},
        {"chosen": TALK, "rejected": TALK},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "answer": "Hello"},
    ],
)
def test_demonstrations_come_in_the_fields_usual_shapes(tmp_path, row):
    path = write_jsonl(tmp_path / "d.jsonl", [row])
    assert [messages for _, messages in read_dialogues(str(path))] == [TALK]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi"}, "d.jsonl:1: got keys prompt, expected prompt with one of response,"),
        ({"messages": HI}, "a dialogue of 1 turns, the last one's role 'user'"),
        ({"prompt": "Hi", "response": " "}, "d.jsonl:1: got an empty last turn"),
        ({"response": "Hello"}, "d.jsonl:1: response: got a text that is no dialogue"),
        ({"messages": []}, r"d.jsonl:1: messages: got \[\], expected text or chat"),
        ({"prompt": 3, "response": "x"}, "d.jsonl:1: prompt: got 3"),
    ],
)
def test_a_bad_demonstration_is_named_with_its_line(tmp_path, row, message):
    path = write_jsonl(tmp_path / "d.jsonl", [row])
    with pytest.raises(InputError, match=message) as error:
        list(read_dialogues(str(path)))
    assert "\n" not in str(error.value)


def examples(n: int, source: str = "revisions") -> list[Example]:
    return [Example(f"{source}{i}", f"key{i % (n // 2)}", source, []) for i in range(n)]


def test_no_prompt_is_both_trained_on_and_held_out():
    settings = checked(Settings, {"sft": {"eval_fraction": 0.3}}, "test").sft
    train, tests = split(examples(400), settings)
    assert len(train) + len(tests) == 400
    assert not {e.split_key for e in train} & {e.split_key for e in tests}
    assert 80 < len(tests) < 160


def test_more_data_moves_no_prompt_between_the_two():
    keys = [str(n) for n in range(1000)]
    few, many = held_out(keys[:300], 0.1, 0), held_out(keys, 0.1, 0)
    assert few == many & set(keys[:300])
    assert few != held_out(keys[:300], 0.1, seed=1)


@pytest.mark.parametrize(
    ("n", "fraction", "want"), [(0, 0.5, 0), (1, 0.5, 0), (2, 0.01, 1), (9, 0.001, 1), (9, 0, 0)]
)
def test_few_prompts_still_leave_one_on_each_side(n, fraction, want):
    assert len(held_out(map(str, range(n)), fraction, 0)) == want
    assert len(held_out(map(str, range(n)), 0.999, 0)) == max(0, n - 1)


def test_a_dialogue_and_its_continuation_fall_on_the_same_side(run, tmp_path):
    longer = [*TALK, {"role": "user", "content": "More"}, {"role": "assistant", "content": "No"}]
    path = str(write_jsonl(tmp_path / "d.jsonl", [{"messages": TALK}, {"messages": longer}]))
    assert len({e.split_key for e in read_examples(run(data={path: 1.0})).rows}) == 1


def test_what_is_held_out_mirrors_the_mixture():
    sft = {"eval_fraction": 0.5, "data": {"revisions": 1.0, "big": 0.1}}
    settings = checked(Settings, {"sft": sft}, "test").sft
    _, tests = split(examples(200) + examples(2000, "big"), settings)
    count = Counter(e.source for e in mirror_mixture(tests, settings))
    assert 70 < count["revisions"] < 130
    assert 60 < count["big"] < 140
