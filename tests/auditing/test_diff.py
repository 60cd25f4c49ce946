"""What flipped between two labellings, and what an edit to a constitution costs."""

import json
from collections import defaultdict
from itertools import combinations

import pytest
import tomli_w
from typer.testing import CliRunner

from aif.auditing.diff import diff
from aif.cli.verbs import app
from aif.config.settings import LabelSettings, LLMSettings, Settings
from aif.constitution.diff import EVERY, WAYS, constitution_diff
from aif.constitution.file import Constitution, Example, Revised
from aif.judge.judge import Judge
from aif.run import Run
from aif.store.records import Comparison, Label
from tests.conftest import read_jsonl, write_constitution, write_jsonl


def cli(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def compared(*arguments: object) -> dict:
    result = cli("diff", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


# ---- figures, of labels that are written down


PAIRS = [Comparison.of([{"role": "user", "content": f"p{n}"}], "x", "y") for n in range(12)]


@pytest.fixture
def written(tmp_path):
    """A run whose labels are these: a probability, or the fault that a null has."""

    def make(name, probabilities, rows=PAIRS, principle="kind"):
        run = Run(tmp_path / name, Settings())
        run.path.mkdir()
        run.write("comparisons.jsonl", rows)
        run.write("verdicts.jsonl", [])
        labels = []
        for row, p in zip(rows, probabilities, strict=False):
            if isinstance(p, str):
                labels.append(Label.null(row.id, p))
            else:
                labels.append(Label(row.id, p, None, 2, None, {principle: p}))
        run.write("labels.jsonl", labels)
        return run

    return make


P_A = [0.9, 0.8, 0.7, 0.6, 0.4, 0.3, 0.5, 0.5]
P_B = [0.8, 0.8, 0.1, 0.4, 0.3, 0.95, 0.5, 0.7]


def test_figures_are_those_worked_out_by_hand(written):
    summary = diff(written("a", P_A), written("b", P_B))
    figures = summary["all"]
    # The same side: 3, and one even in both; opposite: 3; half: one even against one that is not.
    assert (figures["n"], figures["flips"]) == (8, 3)
    assert figures["agreement"] == pytest.approx(4.5 / 8)
    assert figures["moved"] == pytest.approx((0.1 + 0.6 + 0.2 + 0.1 + 0.65 + 0.2) / 8)
    # By chance: A is first 4, second 2, even 2 of 8; B is first 4, second 3, even 1.
    chance = (4 * (4 + 0.5) + 2 * (3 + 0.5) + 2 * (1 + 3.5)) / 64
    assert figures["kappa"] == pytest.approx((4.5 / 8 - chance) / (1 - chance))
    low, high = figures["interval"]
    assert low == pytest.approx(0.2152, abs=1e-4)  # Wilson's, 4 of 8
    assert high == pytest.approx(0.7848, abs=1e-4)
    assert summary["by_principle"] == {"kind": figures}


def test_flips_are_sorted_by_how_far_they_moved(written):
    a, b = written("a", P_A), written("b", P_B)
    summary = diff(a, b, show=2)
    rows = read_jsonl(b.path / "diff.jsonl")
    assert [row["prompt"][0]["content"] for row in rows] == ["p5", "p2", "p3"]
    assert [row["moved"] for row in rows] == pytest.approx([0.65, 0.6, 0.2])
    assert summary["largest"] == rows[:2]
    assert (rows[2]["a"]["p_first"], rows[2]["b"]["p_first"]) == (0.6, 0.4)


def test_two_who_say_the_same_of_all_have_no_kappa(written):
    row = diff(written("a", [0.9, 0.8]), written("b", [0.7, 0.6]))["all"]
    assert (row["agreement"], row["kappa"], row["flips"]) == (1, None, 0)


def test_a_pair_the_other_way_round_has_its_label_turned(written):
    a = written("a", [0.9, 0.2, 0.7])
    b = written("b", [0.1, 0.8, 0.2], [PAIRS[0].swapped(), PAIRS[1].swapped(), PAIRS[2]])
    summary = diff(a, b)
    assert summary["comparisons"] == {"both": 3, "turned": 2, "only_a": 9, "only_b": 0}
    assert summary["all"]["flips"] == 1
    assert summary["all"]["moved"] == pytest.approx(0.5 / 3)
    assert summary["by_principle"]["kind"]["flips"] == 1


def test_a_pair_that_stands_both_ways_counts_once(written):
    a = written("a", [0.9], PAIRS[:1])
    summary = diff(a, written("b", [0.8, 0.7], [PAIRS[0], PAIRS[0].swapped()]))
    assert summary["comparisons"] == {"both": 1, "turned": 0, "only_a": 0, "only_b": 1}
    assert summary["all"]["n"] == 1


def test_nulls_are_counted_by_fault_and_never_agree(written):
    a = written("a", [0.9, "refused", "unparsed", 0.2, 0.3])
    b = written("b", [0.9, "refused", 0.4, "backend", "backend"])
    summary = diff(a, b)
    assert summary["nulls"] == {"both": 1, "gained": {"backend": 2}, "lost": {"unparsed": 1}}
    assert summary["all"]["n"] == 1
    assert summary["labels"] == {"a": 5, "b": 5, "both": 5}


def test_a_null_of_a_turned_pair_keeps_its_fault(written):
    a = written("a", ["refused", 0.2])
    summary = diff(a, written("b", [0.1, 0.8], [PAIRS[0].swapped(), PAIRS[1].swapped()]))
    assert summary["nulls"] == {"both": 0, "gained": {}, "lost": {"refused": 1}}


def test_labels_of_one_run_alone_are_not_in_both(written):
    summary = diff(written("a", [0.9]), written("b", [0.9, 0.8]))
    assert summary["labels"] == {"a": 1, "b": 2, "both": 1}


def test_where_all_are_null_there_is_no_figure(written):
    a, b = written("a", ["refused"]), written("b", [0.9])
    figures = diff(a, b)["all"]
    assert figures["n"] == 0
    assert figures["agreement"] is figures["kappa"] is figures["interval"] is None
    assert "  -" in cli("diff", a.path, b.path).stdout


def test_a_principle_of_one_run_alone_has_no_figures(written):
    summary = diff(written("a", [0.9]), written("b", [0.9], principle="warm"))
    assert summary["by_principle"] == {}


# ---- runs that a judge labelled


SAYS = "Response B: it helps the person more. \x1b[31m So: B"


@pytest.fixture
def label(tmp_path):
    """`aif label` by a scripted judge of rules; returns the run folder."""

    def run(name, rules=None, questions=None, pairs=8, more=(), **lines):
        constitution = tmp_path / f"{name}.toml"
        questions = questions or {"kind": "Which is kinder?", "warm": "Warmer?"}
        write_constitution(constitution, questions, **lines)
        rows = [
            {"prompt": f"prompt {n}", "response_a": f"left {n}", "response_b": f"right {n}"}
            for n in range(pairs)
        ]
        rules = rules or [
            {"match": "(?=.*Warmer).*left 0.*right 0", "logprobs": {"A": -1, "B": -0.7}},
            {"match": "(?=.*Warmer).*right 0.*left 0", "logprobs": {"A": -0.7, "B": -1}},
            {"match": r"left \d.*right \d", "logprobs": {"A": -0.5, "B": -1.2}},
            {"logprobs": {"A": -1, "B": -0.5}},
        ]
        arguments = ["--pairs", write_jsonl(tmp_path / "pairs.jsonl", rows)]
        arguments += ["--constitution", constitution]
        arguments += ["--judge", f"scripted:{write_jsonl(tmp_path / f'{name}.rules', rules)}"]
        out = tmp_path / "runs" / name
        result = cli("label", "--out", out, *arguments, "--max-fault-rate", "1", *more)
        assert result.exit_code == 0, result.stderr
        return out

    return run


AGAINST = [
    {"match": "prompt 7", "fault": "refused"},
    {"match": r"left [0-4].*right \d", "text": SAYS},
    {"match": r"right [0-4]", "text": SAYS.replace("B", "A")},
    {"match": r"left \d.*right \d", "logprobs": {"A": -0.5, "B": -1}},
    {"logprobs": {"A": -1, "B": -0.5}},
]


def test_another_judge(label, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    one, two = label("one"), label("two", AGAINST)
    summary = compared(one, two)
    assert summary["nulls"]["gained"] == {"refused": 1}
    assert summary["all"]["n"] == 7
    assert summary["all"]["flips"] == len(read_jsonl(two / "diff.jsonl")) == 5
    assert summary["by_principle"]["warm"]["flips"] == 4  # prompt 0 was the second's before
    assert any(line.startswith("judge changed: model") for line in summary["differences"])
    result = cli("diff", one, two, "--show", "1")
    lines = [line for line in result.stdout.splitlines() if "/" not in line]  # names of files
    assert len(lines) > 15
    assert max(map(len, lines)) <= 60
    assert "all                 0.29" in result.stdout
    assert "null: in B alone 1 refused" in result.stdout
    assert "1. A: 0.65 -> B: 0.25" in result.stdout
    assert "2. A: " not in result.stdout
    assert "first" in result.stdout
    assert "it helps the person more" in result.stdout.replace("\n", " ")
    assert "\x1b" not in result.stdout


def test_a_flip_has_the_raw_verdicts_of_both(label):
    two = label("two", AGAINST)
    compared(label("one"), two)
    flip = read_jsonl(two / "diff.jsonl")[0]
    said = [(v["principle_id"], v["order"], v["text"]) for v in flip["b"]["verdicts"]]
    of = [
        v for v in read_jsonl(two / "verdicts.jsonl") if v["comparison_id"] == flip["comparison_id"]
    ]
    assert said == [(v["principle_id"], v["order"], v["text"]) for v in of]
    assert [v["text"] for v in flip["a"]["verdicts"]] == [None] * 4


def test_verdicts_of_a_turned_pair_are_turned_too(label, tmp_path):
    one, two = label("one"), label("two", AGAINST)
    rows = [Comparison(**row) for row in read_jsonl(one / "comparisons.jsonl")]
    write_jsonl(
        tmp_path / "turned.jsonl",
        [{"prompt": r.prompt, "response_a": r.second, "response_b": r.first} for r in rows],
    )
    other = label("three", AGAINST, more=["--pairs", tmp_path / "turned.jsonl"])
    straight, back = compared(one, two), compared(one, other)
    assert back["comparisons"]["turned"] == 8
    assert back["all"].pop("moved") == pytest.approx(straight["all"].pop("moved"))
    assert back["all"] == straight["all"]
    by_prompt = {row["prompt"][0]["content"]: row for row in read_jsonl(two / "diff.jsonl")}
    for row in read_jsonl(other / "diff.jsonl"):
        twin = by_prompt[row["prompt"][0]["content"]]
        assert (row["first"], row["second"]) == (twin["second"], twin["first"])
        for side in "ab":
            assert row[side]["p_first"] == pytest.approx(1 - twin[side]["p_first"])
            p_of = {(v["principle_id"], v["order"]): v["p_first"] for v in row[side]["verdicts"]}
            for v in twin[side]["verdicts"]:
                swapped = v["principle_id"], v["order"][::-1]
                assert p_of[swapped] == pytest.approx(1 - v["p_first"])


def test_what_differs_is_printed(label, tmp_path):
    one = label("one")
    two = label("two", questions={"kind": "Which is kindest?", "new": "Newer?"})
    assert set(compared(one, two)["differences"]) >= {
        "principle 'kind' was edited",
        "principle 'warm' is gone",
        "principle 'new' is new",
    }
    same = label("same", more=["--set", f"judge.model=scripted:{tmp_path / 'one.rules'}"])
    assert compared(one, same)["differences"] == []
    assert "no setting, question or rule differs" in cli("diff", one, same).stdout


def test_another_protocol_is_no_edit_of_the_principles(label):
    graded = 'grade = "Kind?"'
    one = label("one", questions={"kind": "Kinder?"}, kind=graded)
    rules = [{"logprobs": {"Yes": -0.1, "No": -3}}]
    more = ["--protocol", "pointwise"]
    two = label("two", rules, questions={"kind": "Kinder?"}, kind=graded, more=more)
    differences = compared(one, two)["differences"]
    assert "protocol changed: pairwise -> pointwise" in differences
    assert not any("principle" in line for line in differences)


# ---- a run against what its paid answers come to


def test_other_weights_without_a_call_and_as_label_then_has_it(label, tmp_path):
    one = label("one")
    before = {row["comparison_id"]: row["p_first"] for row in read_jsonl(one / "labels.jsonl")}
    journal = (one / "journal" / "label.jsonl").read_bytes()
    questions = {"kind": "Which is kinder?", "warm": "Warmer?"}
    write_constitution(tmp_path / "other.toml", questions, warm="weight = 9")
    summary = compared(one, "--constitution", tmp_path / "other.toml")
    assert (one / "journal" / "label.jsonl").read_bytes() == journal
    assert summary["differences"] == [
        "only weights or rules of the constitution changed: no call is needed"
    ]
    result = cli("label", "--out", one, "--constitution", tmp_path / "other.toml")
    assert "0 calls made" in result.stdout
    after = {row["comparison_id"]: row["p_first"] for row in read_jsonl(one / "labels.jsonl")}
    moved = [abs(before[key] - after[key]) for key in before]
    assert summary["all"]["moved"] == pytest.approx(sum(moved) / len(moved))
    flipped = {key for key in before if (before[key] - 0.5) * (after[key] - 0.5) < 0}
    assert {row["comparison_id"] for row in summary["largest"]} == flipped
    assert len(flipped) == 1
    assert all(row["b"]["verdicts"] == row["a"]["verdicts"] != [] for row in summary["largest"])


def test_before_and_after_an_edit(label, tmp_path):
    one = label("one")
    edited = {"kind": "Which is kindest?", "warm": "Warmer?"}
    write_constitution(tmp_path / "edited.toml", edited)
    result = cli("diff", one, "--constitution", tmp_path / "edited.toml")
    assert result.exit_code == 1
    assert "calls are missing" in result.stderr
    assert "aif plan" in result.stderr
    more = ["label", "--out", one, "--constitution", tmp_path / "edited.toml"]
    assert cli(*more, "--limit", "3").exit_code == 0
    assert cli(*more[:3], "--limit", "8").exit_code == 0  # back, without a call
    summary = compared(one, "--constitution", tmp_path / "edited.toml")
    assert summary["labels"] == {"a": 8, "b": 3, "both": 3}
    assert summary["differences"] == ["principle 'kind' was edited"]


# ---- errors, and a run that is being written


def test_a_run_that_is_being_written(label):
    one, two = label("one"), label("two", AGAINST)
    run = Run(two, Settings())
    with run.writing():
        run.write_state("label", {"in_progress": True, **run.state("label")})
        summary = compared(one, two)
    assert summary["differences"] is None
    assert "its labels are of before" in summary["notes"][0]
    assert summary["all"]["n"] == 7


def test_errors_are_one_line(label, tmp_path, written):
    one = label("one")
    other = written("other", [0.9]).path
    (tmp_path / "empty").mkdir()
    for arguments, said in [
        ((one, one), "expected another run"),
        ((one, one / ".." / "one"), "expected another run"),
        ((one, tmp_path / "empty"), "labels.jsonl: got no such file"),
        ((tmp_path / "empty", one), "labels.jsonl: got no such file"),
        ((one, tmp_path / "gone"), "no such folder"),
        ((one, other), "no comparison is in both"),
        ((one, other, "--judge", "smollm2-135m"), "RUN_B"),
        ((other,), "label: constitution"),
    ]:
        result = cli("diff", *arguments)
        assert result.exit_code == 1, arguments
        assert said in result.stderr
        assert result.stderr.count("\n") == 1


# ---- two constitutions


def constitution(weights=(1, 1, 1), text="{0} {1}?", ids="abc", **head) -> Constitution:
    def words(key: str, name: str) -> str:
        return text.format(key, name)

    principles = [
        {"id": name, "weight": weight, "compare": words("compare", name)}
        | {"grade": words("grade", name), "cue": words("cue", name)}
        for name, weight in zip(ids, weights, strict=False)
    ]
    return Constitution(**{"name": "c", "principle": principles} | head)


def edited(base: Constitution, place: int, **change) -> Constitution:
    principles = list(base.principle)
    principles[place] = principles[place].model_copy(update=change)
    return base.model_copy(update={"principle": principles})


BASE = constitution()
FILES = {
    "base": BASE,
    "compare": edited(BASE, 0, compare="Other?"),
    "grade": edited(BASE, 1, grade="Other?"),
    "cue": edited(BASE, 2, cue="Other"),
    "renamed": edited(BASE, 0, id="z"),
    "weights": constitution((1, 5, 1)),
    "rules": constitution(combine="veto", veto=0.2),
    "preamble": constitution(preamble="Be strict."),
    "fewer": constitution(ids="ab"),
    "more": constitution((1, 1, 1, 1), ids="abcd"),
    "reordered": constitution(ids="cab"),
    "sample": constitution(principles="sample"),
    "sample weights": constitution((1, 5, 1), principles="sample"),
    "sample more": constitution((1, 1, 1, 1), ids="abcd", principles="sample"),
    "sample fewer": constitution(ids="ab", principles="sample"),
    "sample renamed": edited(constitution(principles="sample"), 0, id="z"),
}
MANY = [Comparison.of([{"role": "user", "content": f"p{n}"}], "x", "y") for n in range(120)]


@pytest.mark.parametrize("way", WAYS)
def test_what_is_asked_again_is_what_a_judge_asks(way):
    """Every file against every other: by the calls of 120 comparisons."""
    protocol, form = WAYS[way]
    calls = {}
    for name, file in FILES.items():
        judge = Judge(file, LLMSettings(model="m", form=form), LabelSettings(protocol=protocol))
        calls[name] = [
            (call.id, call.principle.id) for row in MANY for call in judge.calls_for(row)
        ]
    for one, two in [*combinations(FILES, 2), *((b, a) for a, b in combinations(FILES, 2))]:
        before = {call for call, _ in calls[one]}
        missing = defaultdict(int)
        for call, principle in calls[two]:
            missing[principle] += call not in before
        asks_again = constitution_diff(FILES[one], FILES[two])["asks_again"][way]
        assert {name for name, n in missing.items() if n} == set(asks_again), (one, two)
        every = {name for name, which in asks_again.items() if which == EVERY}
        assert {name for name, n in missing.items() if n == 2 * len(MANY)} == every, (one, two)


def test_what_changed_is_printed(tmp_path):
    a, b = tmp_path / "a.toml", tmp_path / "b.toml"
    long = "Which of the two responses to the person is the one that is "
    write_constitution(a, {"kind": f"{long}kind?", "old": "Old?"})
    write_constitution(
        b, {"kind": f"{long}good?", "new": "New?"}, 'combine = "veto"', kind="weight = 2"
    )
    output = cli("constitution", "diff", a, b).stdout
    assert "combine: 'mean-logit' -> 'veto'" in output
    assert "principle 'kind' was edited" in output
    assert "weight: 1.0 -> 2.0" in output
    assert "that is kind?' -> '" in output  # from shortly before where they part
    assert "that is good?'" in output
    assert "principle 'old' is gone" in output
    assert "principle 'new' is new" in output
    assert "pairwise: kind, new (every comparison)" in output
    assert "pointwise, as text: cannot be asked, as a principle lacks its question" in output
    assert "aif revise: no call" in output
    summary = json.loads(cli("constitution", "diff", a, b, "--json").stdout)
    assert summary["changed"] == {"combine": ["mean-logit", "veto"]}
    assert [p["is"] for p in summary["principles"]] == ["edited", "gone", "new"]
    assert "nothing differs" in cli("constitution", "diff", a, a).stdout


def test_a_new_principle_is_no_other_order():
    reordered_by = {name: constitution_diff(BASE, FILES[name])["reordered"] for name in FILES}
    assert {name for name, reordered in reordered_by.items() if reordered} == {"reordered"}


def test_weights_and_rules_need_no_call_and_examples_are_counted(tmp_path):
    example = [Example(text=f"{n}", verdict=bool(n % 2)) for n in range(4)]
    a = edited(BASE, 0, example=example[:3], critique="C.", revision="R.")
    changes = constitution_diff(a, edited(a, 0, weight=3.0))
    assert set(map(str, changes["asks_again"].values())) == {"{}"}
    assert changes["revise"] == {"edited": [], "draws_move": True}
    changes = constitution_diff(a, edited(a, 0, revision="Other."))
    assert set(map(str, changes["asks_again"].values())) == {"{}"}
    assert changes["revise"] == {"edited": ["a"], "draws_move": False}
    worked = Revised(prompt="P.", response="X.", critique="C.", revision="R.")
    changes = constitution_diff(a, edited(a, 0, revised=[worked]))
    assert changes["revise"] == {"edited": ["a"], "draws_move": False}
    b = edited(a, 0, example=example[1:])
    changes = constitution_diff(a, b)["asks_again"]
    assert changes == {
        "pairwise": {},
        "pointwise, as chat": {"a": EVERY},
        "pointwise, as text": {"a": EVERY},
    }
    for name, file in (("a", a), ("b", b)):
        tables = file.model_dump(exclude_none=True)
        (tmp_path / f"{name}.toml").write_text(tomli_w.dumps(tables))
    output = cli("constitution", "diff", tmp_path / "a.toml", tmp_path / "b.toml").stdout
    assert "example: 1 gone, 1 new, 3 in all" in output
