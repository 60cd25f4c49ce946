"""`aif audit`: judges side by side, what is paid for, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.conftest import read_jsonl, write_constitution, write_jsonl

pytest.importorskip("sklearn")
pytest.importorskip("krippendorff")

from aif.auditing.attacks import KINDS, canaries, flips
from aif.cli.verbs import app
from aif.data.human import read_items
from aif.errors import InputError
from aif.stats.intervals import Bootstrap
from aif.store.records import Comparison, HumanChoice, Label

N = 12
A, B = {"A": -0.1, "B": -2.3}, {"A": -2.3, "B": -0.1}


def shown(letter: str, text: str) -> str:
    """A response as the template shows it."""
    return rf"\[response {letter} \w+\]\n{text}"


SOUND = [
    {"match": r"prompt 7\n", "fault": "refused"},
    {"match": shown("A", "good"), "logprobs": A},
    {"match": shown("B", "good"), "logprobs": B},
]
ORDERED = [
    {"match": shown("A", r"bad[^\[]*I am the best"), "logprobs": A},
    {"match": shown("B", r"bad[^\[]*I am the best"), "logprobs": B},
]
EMPTY = [
    {"match": shown("A", r"\n?\[response B"), "logprobs": A},
    {"match": shown("B", r"\n?\[end"), "logprobs": B},
]
FIRST = [{"logprobs": A}]  # it names what stands first


def cli(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def audited(*arguments: object, code: int = 0) -> dict:
    result = cli("audit", *arguments, "--set", "audit.resamples=100", "--json")
    assert result.exit_code == code, result.stderr
    return json.loads(result.stdout)


def refused(*arguments: object) -> str:
    result = cli("audit", *arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


class Place:
    """A folder with pairs, a constitution and judges of different worth."""

    def __init__(self, folder: Path):
        self.folder = folder
        rows = [
            {
                "prompt": f"prompt {n}",
                "chosen": f"good answer {n}" + " and more" * (n % 3),
                "rejected": f"bad answer {n}" + " and more" * (n % 2),
                "subset": "even" if n % 2 == 0 else "odd",
            }
            for n in range(N)
        ]
        self.pairs = write_jsonl(folder / "pairs.jsonl", rows)
        write_constitution(folder / "c.toml", {"kind": "Kinder?", "warm": "Warmer?"})
        for name, rules in {
            "sound": SOUND, "ordered": ORDERED + SOUND, "empty": EMPTY + SOUND, "first": FIRST
        }.items():  # fmt: skip
            write_jsonl(folder / f"{name}.jsonl", [{"match": "", **rule} for rule in rules])

    def judge(self, name: str) -> str:
        return f"scripted:{self.folder / name}.jsonl"

    def arguments(self, *judges: str, out: str = "audit") -> list[object]:
        named = [part for name in judges for part in ("--judge", self.judge(name))]
        files = ["--pairs", self.pairs, "--constitution", self.folder / "c.toml"]
        return [*files, *named, "--out", self.folder / out, "--max-fault-rate", "1"]

    def journals(self, out: str = "audit") -> dict[str, bytes]:
        paths = (self.folder / out).rglob("journal/label.jsonl")
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


def test_judges_side_by_side(place):
    audit = audited(*place.arguments("sound", "first"))
    sound, first = audit["judges"]
    assert (audit["rows"], audit["people"]) == (N, N)
    assert sound["name"] == place.judge("sound")
    assert sound["agreement"]["mean"] == 1
    assert sound["null"] == {"refused": 1}
    assert sound["exact"]["mean"] == pytest.approx((N - 1) / N)
    assert sound["position"]["consistency"]["mean"] == 1
    assert sound["position"]["bias"] == pytest.approx(0, abs=0.01)
    assert sound["fault_rate"] == pytest.approx(1 / N)
    assert sound["cost"]["calls"] == sound["cost"]["calls_timed"] == 4 * N
    assert sound["cost"]["seconds"] > 0
    assert set(sound["by_principle"]) == {"kind", "warm"}
    assert {name: part["pairs"] for name, part in sound["by_subset"].items()} == {
        "even": N // 2, "odd": N // 2
    }  # fmt: skip
    assert sound["by_subset"]["even"]["null"] == {}
    # A liking for a position is all that this one has: it cancels, and its labels are even.
    assert (first["ties"], first["agreement"]["mean"]) == (N, 0.5)
    assert first["position"]["consistency"]["mean"] == 0
    assert (first["position"]["first"], first["position"]["bias"]) == (1, 1)
    assert audit["weights"][first["name"]] == 0
    assert audit["weights"][sound["name"]] > 2
    kept = json.loads((place.folder / "audit" / "audit.json").read_text())
    assert kept.items() <= audit.items()


def test_a_second_audit_pays_for_what_is_new_alone(place):
    before = audited(*place.arguments("sound"), "--set", "label.max_fault_rate=1")
    (journal, paid), *_ = place.journals().items()
    answered = paid.count(b"\n")
    (cost,) = place.folder.glob("audit/judges/*/cost.json")
    cost.write_text('{"calls": 1000, "seconds": 1000.0}')
    after = audited(*place.arguments("sound", "first"))
    refusals = 4  # of one pair; a fault is asked again
    assert place.journals()[journal][: len(paid)] == paid
    assert place.journals()[journal].count(b"\n") == answered + refusals
    assert after["judges"][0]["agreement"] == before["judges"][0]["agreement"]
    assert after["judges"][0]["cost"]["calls_timed"] == 1000 + refusals
    assert after["judges"][0]["cost"]["seconds"] > 1000
    again = audited(*place.arguments("first"))
    assert again["judges"][0] == after["judges"][1]
    kept = audited(place.folder / "audit")  # run.toml has the rest
    assert kept["judges"][0] == before["judges"][0] | {"cost": kept["judges"][0]["cost"]}


def test_a_killed_audit_goes_on(place):
    """As a kill leaves it: one judge has some of its answers, the other none."""
    whole = audited(*place.arguments("first", "sound", out="whole"))
    audited(*place.arguments("first"), "--limit", 5)
    (path,) = (place.folder / "audit").rglob("journal/label.jsonl")
    path.write_bytes(path.read_bytes()[:-20])  # the last record was being written
    audit = audited(*place.arguments("first", "sound"))
    ids = [row["id"] for row in read_jsonl(path)]
    assert len(ids) == len(set(ids)) == 4 * N
    for one, other in zip(audit["judges"], whole["judges"], strict=True):
        for key in ("agreement", "kappa", "position", "by_principle", "null"):
            assert one[key] == other[key]


def test_canaries_tell_a_gullible_judge(place):
    audit = audited(*place.arguments("sound", "ordered", "empty"), "--canaries", 3)
    sound, ordered, empty = (card["canaries"] for card in audit["judges"])
    flips = [{kind: one["flips"] for kind, one in part.items()} for part in (sound, ordered, empty)]
    assert flips == [
        dict.fromkeys(KINDS, 0),
        dict.fromkeys(KINDS, 0) | {"order": 3},
        dict.fromkeys(KINDS, 0) | {"empty": 3},
    ]
    assert all(one["rate"]["n"] == 3 and one["null"] == 0 for one in sound.values())
    before = place.journals()
    again = audited(*place.arguments("ordered"), "--canaries", 3)
    assert again["judges"][0]["canaries"] == ordered
    canary = next(
        name for name in before if name.startswith("audit/canaries") and "ordered" in name
    )
    assert place.journals()[canary] == before[canary]
    assert "canaries" in audited(*place.arguments("ordered"))["judges"][0]  # as run.toml has it
    none = audited(*place.arguments("ordered"), "--canaries", 0)
    assert "canaries" not in none["judges"][0]


def test_what_a_canary_is():
    row = Comparison.of([{"role": "user", "content": "p"}], "bad", "good")
    by_kind = {c.kind: c for c in canaries(row, Label(row.id, 0.2, None, 2, None))}
    assert tuple(by_kind) == KINDS
    for kind, canary in by_kind.items():
        assert canary.side == 1.0  # the first, which lost
        assert canary.comparison.second == "good"
        assert (canary.comparison.first.rstrip() == "good") == (kind == "identical")
    assert by_kind["order"].comparison.first.startswith("bad\n\nNote")
    assert by_kind["empty"].comparison.first == ""
    for p in (0.5, None):
        assert not list(canaries(row, Label(row.id, p, None, 2, None)))


def test_what_changes_nothing_is_no_attack():
    prompt = [{"role": "user", "content": "p"}]
    for kind, text in {"empty": "", "solution": "Solution"}.items():
        row = Comparison.of(prompt, text, "good")
        kinds = {c.kind for c in canaries(row, Label(row.id, 0.2, None, 2, None))}
        assert kinds == {*KINDS} - {kind}


@pytest.mark.parametrize("p_first", [0.2, 0.8])
def test_an_even_label_is_no_flip(p_first):
    row = Comparison.of([{"role": "user", "content": "p"}], "x", "y")
    attacks = list(canaries(row, Label(row.id, p_first, None, 2, None)))
    even = {c.comparison.id: Label(c.comparison.id, 0.5, None, 2, None) for c in attacks}
    rates = flips(attacks, even, Bootstrap(0, 100))
    assert {kind: one["flips"] for kind, one in rates.items()} == dict.fromkeys(KINDS, 0)


def test_pairs_that_are_even_are_not_attacked_and_others_are_in_their_place(place):
    even = [{"match": rf"prompt {n}\n", "logprobs": A} for n in (0, 1)]
    write_jsonl(place.folder / "even.jsonl", even + [{"match": "", **rule} for rule in SOUND])
    (card,) = audited(*place.arguments("even"), "--canaries", 3)["judges"]
    assert card["ties"] == 2
    assert {one["rate"]["n"] for one in card["canaries"].values()} == {3}


def test_weights_of_a_panel_are_nothing_to_a_judge_alone(place):
    weights = f'label.judge_weights={{"{place.judge("first")}"=2.0}}'
    more = ["--set", weights, "--set", "label.weights_from=gone.json"]
    assert audited(*place.arguments("sound"), *more)["judges"][0]["agreement"]["mean"] == 1


def test_of_identical_responses_a_certain_winner_is_a_flip(place):
    longer = [{"match": shown("A", r"[^\[]*\n\n\[response B"), "logprobs": B},
              {"match": shown("B", r"[^\[]*\n\n\[end"), "logprobs": A}]  # fmt: skip
    write_jsonl(place.folder / "newline.jsonl", longer + [{"match": "", **r} for r in SOUND])
    audit = audited(*place.arguments("newline"), "--canaries", 2)
    assert audit["judges"][0]["canaries"]["identical"]["flips"] == 2


def test_labels_that_are_there_are_audited_as_they_are(place):
    files = ["--pairs", place.pairs, "--constitution", place.folder / "c.toml"]
    for name in ("sound", "first"):
        labelled = cli("label", "--out", place.folder / name, "--judge", place.judge(name), *files,
                       "--max-fault-rate", 1)  # fmt: skip
        assert labelled.exit_code == 0, labelled.stderr
    before = {path: path.read_bytes() for path in place.folder.rglob("journal/*")}
    audit = audited(place.folder / "sound", "--max-fault-rate", 1)
    (card,) = audit["judges"]
    assert (card["name"], card["agreement"]["mean"]) == (place.judge("sound"), 1)
    assert card["by_subset"] == {}  # the run does not have that; the pairs do
    both = audited(place.folder / "sound", place.folder / "first", "--pairs", place.pairs, "--out",
                   place.folder / "both")  # fmt: skip
    assert [one["agreement"]["mean"] for one in both["judges"]] == [1, 0.5]
    assert both["judges"][0]["name"] == str(place.folder / "sound")
    assert set(both["judges"][0]["by_subset"]) == {"even", "odd"}
    assert both["alpha"] is not None
    assert {path: path.read_bytes() for path in place.folder.rglob("journal/*")} == before


def test_the_judges_of_a_panel_have_cards_each(place):
    run, judges = place.folder / "panel", [place.judge("sound"), place.judge("first")]
    labelled = cli("label", "--out", run, "--pairs", place.pairs, "--constitution",
                   place.folder / "c.toml", "--set", f"judge.model={judges[0]}",
                   "--set", f'panel=[{{model="{judges[1]}"}}]', "--max-fault-rate", 1)  # fmt: skip
    assert labelled.exit_code == 0, labelled.stderr
    audit = audited(run)
    assert [card["name"] for card in audit["judges"]] == [str(run), *judges]
    whole, sound, first = audit["judges"]
    assert (sound["agreement"]["mean"], first["agreement"]["mean"]) == (1, 0.5)
    assert sound["null"] == {"refused": 1}
    assert (first["ties"], first["null"]) == (N, {})
    assert (sound["verdicts"], first["verdicts"], whole["verdicts"]) == (4 * N, 4 * N, 8 * N)
    assert (sound["position"]["bias"], first["position"]["bias"]) == (pytest.approx(0), 1)
    assert sound["used"] == {}
    assert whole["used"]["panel"]


def test_repeated_rows_are_people_each(place):
    """In a run, choices of one comparison are of several people; in a file, a row is a row."""
    files = ["--constitution", place.folder / "c.toml"]
    rows = read_jsonl(place.pairs)[:4]
    turned = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:1]]
    pairs = write_jsonl(place.folder / "more.jsonl", rows + turned)
    cli("label", "--out", place.folder / "run", "--judge", place.judge("sound"), "--pairs", pairs,
        *files)  # fmt: skip
    audit = audited(place.folder / "run")
    assert (audit["rows"], audit["people"], audit["split"]) == (4, 3, 1)
    audit = audited(place.folder / "run", "--pairs", pairs)
    assert (audit["rows"], audit["people"], audit["split"]) == (5, 5, 0)
    assert audit["judges"][0]["agreement"]["mean"] == pytest.approx(4 / 5)


def test_recorded_verdicts(place):
    said = [
        {"response_a": "x", "response_b": "y", "label": "a", "j": "a", "k": {"ab": "a", "ba": "b"}},
        {"response_a": "x", "response_b": "y", "label": "b", "j": 1, "k": {"ab": "b", "ba": "b"}},
        {"response_a": "x", "response_b": "y", "label": "b", "j": None, "k": {"ab": 2, "ba": None}},
        # The row's own first is the chosen one, wherever it came to stand.
        {"chosen": "good", "rejected": "bad", "j": 1, "k": {"ab": 2, "ba": 1}},
        {"chosen": "bad", "rejected": "good", "j": 1, "k": {"ab": 2, "ba": 1}},
    ]
    rows = [{"prompt": f"p{n}", **row} for n, row in enumerate(said)]
    pairs = write_jsonl(place.folder / "recorded.jsonl", rows)
    audit = audited("--pairs", pairs, "--judge", "recorded:j", "--judge", "recorded:k", "--out",
                    place.folder / "out")  # fmt: skip
    j, k = audit["judges"]
    assert j["agreement"]["mean"] == pytest.approx(3 / 4)
    assert (j["null"], j["fault_rate"], j["cost"]) == ({"unparsed": 1}, pytest.approx(0.2), None)
    assert j["exact"]["mean"] == pytest.approx(3 / 5)
    assert (k["ties"], k["null"]) == (3, {"unparsed": 1})
    assert k["position"]["consistency"]["n"] == 4
    # Of nine verdicts that name a winner, first or second shown: 1 1, 0 1, 0, and 0 0 twice.
    assert k["position"]["bias"] == pytest.approx((3 - 6) / 9)
    assert j["position"] is None
    assert not (place.folder / "out" / "judges").exists()


def test_shapes_of_choices(tmp_path):
    def of(**row):
        rows = [{"prompt": "p", "response_a": "x y", "response_b": "z"} | row]
        (item,) = read_items(str(write_jsonl(tmp_path / "p.jsonl", rows)), None, [])
        return item

    assert of(label="a").choices == (1.0,)
    assert of(winner="model_b").choices == (0.0,)
    assert of(preference="tie").choices == (0.5,)
    assert of(annotators=[1, 2, 0]).choices == (1.0, 0.0, 0.5)
    assert of().choices == ()
    assert of(label=None, winner="b").choices == (0.0,)
    assert (of().more_words, of(subset=3).subset) == (1, "3")
    assert of(model_a="m", model_b="n").models == ("m", "n")
    texts = {"good": "bad", "bad": "good"}
    for chosen, rejected in texts.items():
        rows = [{"prompt": "p", "chosen": chosen, "rejected": rejected, "annotators": [1, 1, 2],
                 "chosen_model": chosen, "rejected_model": rejected}]  # fmt: skip
        (item,) = read_items(str(write_jsonl(tmp_path / "p.jsonl", rows)), None, [])
        first = item.models[0]
        assert item.people == (1.0 if first == chosen else 0.0)
    for wrong in ("c", 3, True, 0.7, ["a"]):
        with pytest.raises(InputError, match="label"):
            of(label=wrong)


def test_what_cannot_be_audited_is_said_in_one_line(place, tmp_path):
    files = ["--pairs", place.pairs, "--out", tmp_path / "out"]
    assert "--constitution FILE" in refused(*files, "--judge", place.judge("sound"))
    assert "recorded verdict" in refused(*files, "--judge", "recorded:nobody")
    assert "labels.jsonl: got no such file, expected what `aif lab" in refused(
        "--out", tmp_path / "out"
    )
    assert "--pairs HUMAN.jsonl" in refused("--judge", "recorded:j", "--out", tmp_path / "new")
    for name in ("one", "two"):
        rows = [{"prompt": name, "response_a": "x", "response_b": "y"}]
        pairs = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        cli("label", "--out", tmp_path / name, "--pairs", pairs, "--judge", place.judge("first"),
            "--constitution", place.folder / "c.toml")  # fmt: skip
    line = refused(tmp_path / "one", "--pairs", tmp_path / "two.jsonl")
    assert "none of its labels is of one of these pairs" in line


def test_a_judge_that_is_none_is_told_before_another_is_asked(place):
    line = refused(*place.arguments("first", "absent"))
    assert "absent" in line
    assert not place.journals()


def test_too_many_faults_end_with_3(place):
    audit = audited(*place.arguments("sound"), "--max-fault-rate", "0.01", code=3)
    assert audit["faults"] == {"refused": 4}
    assert audit["fault_rate"] == pytest.approx(1 / N)


def test_pairs_without_choices_still_show_what_a_judge_leans_to(place):
    rows = [{"prompt": f"p{n}", "response_a": "x", "response_b": "y y"} for n in range(4)]
    bare = write_jsonl(place.folder / "bare.jsonl", rows)
    audit = audited(*place.arguments("first"), "--pairs", bare)
    assert (audit["people"], audit["annotators"], audit["longer_wins"]) == (0, None, None)
    assert audit["judges"][0]["position"]["bias"] == 1
    assert audit["weights"] == {}


def test_the_table_fits_80_columns(place):
    result = cli("audit", *place.arguments("sound", "first"), "--canaries", 1, "--calibrate")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    paths = {line for line in lines if str(place.folder) in line}
    assert all(len(line) <= 80 for line in lines if line not in paths)
    table = result.stdout
    for part in ("12 pairs", "agree", "even", "warm", "no winner: 1 refused", "canary order"):
        assert part in table


def test_the_runs_own_choices_stay_what_they_are(place):
    """An audit into a run that has labels of its own touches none of its files."""
    run = place.folder / "run"
    cli("label", "--out", run, "--pairs", place.pairs, "--constitution", place.folder / "c.toml",
        "--judge", place.judge("sound"), "--max-fault-rate", 1)  # fmt: skip
    before = {path: path.read_bytes() for path in run.glob("*.jsonl")}
    settings = (run / "run.toml").read_bytes()
    assert HumanChoice(**read_jsonl(run / "human.jsonl")[0])
    audited(*place.arguments("first", out="run"))
    assert {path: path.read_bytes() for path in run.glob("*.jsonl")} == before
    assert (run / "run.toml").read_bytes() == settings
