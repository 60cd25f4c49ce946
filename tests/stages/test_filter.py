"""Keeping revisions that the judge prefers: what is compared, what is kept, what it costs."""

import json

import pytest
from typer.testing import CliRunner

from aif.cli.verbs import app
from aif.config.settings import Settings
from aif.run import Run
from aif.store.records import Comparison, Prompt, Response, Revision, content_id
from tests.conftest import read_jsonl, write_jsonl

TALK = [{"role": "user", "content": "Hello."}]
GRADES = {"worse": -2.0, "middling": 0.0, "better": 2.0}  # log-odds of yes


class Place:
    """A run with three responses, and revisions of them that a scripted judge can tell apart."""

    def __init__(self, folder):
        self.path = folder / "run"
        self.constitution = folder / "c.toml"
        self.constitution.write_text(
            'name = "x"\n[[principle]]\nid = "good"\ngrade = "Is it good?"\n'
            '[[principle]]\nid = "kind"\ngrade = "Is it kind?"\n'
        )
        self.rules = folder / "rules.jsonl"
        self.judge_by(
            {"match": rf"\]\n\w+ {word}", "logprobs": {"Yes": -1.0, "No": -1.0 - grade}}
            for word, grade in GRADES.items()
        )
        self.path.mkdir()
        run, prompt = Run(self.path, Settings()), Prompt.of(TALK)
        run.write("prompts.jsonl", [prompt])
        responses = [
            Response(content_id(n), prompt.id, "p", n, f"r{n} middling", "stop", None, {})
            for n in range(3)
        ]
        run.write("responses.jsonl", responses)
        texts = [["better", "worse"], [None, "better"], ["middling", None]]
        rows = [
            Revision(
                content_id(response.id, number), response.id, prompt.id, number, "good", "m", "c",
                word and f"v{number} {word}", None if word else "unchanged", {},
            )
            for response, words in zip(responses, texts, strict=True)
            for number, word in enumerate(words, 1)
        ]  # fmt: skip
        run.write("revisions.jsonl", rows)
        self.responses, self.revisions, self.prompt = responses, rows, prompt

    def judge_by(self, rules) -> None:
        write_jsonl(self.rules, rules)

    def filter(self, *more: str):
        arguments = ["filter", str(self.path), "--judge", f"scripted:{self.rules}", "--json", *more]
        if "revise.constitution" not in " ".join(more):
            arguments += ["--constitution", str(self.constitution)]
        return CliRunner().invoke(app, [*arguments, "--set", "label.protocol=pointwise"])

    def kept(self) -> dict[str, dict]:
        return {row["revision_id"]: row for row in read_jsonl(self.path / "kept.jsonl")}


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def test_a_revision_is_kept_where_the_judge_prefers_it(place):
    result = place.filter()
    assert result.exit_code == 0, result.stderr
    summary, kept = json.loads(result.stdout), place.kept()
    good = [row for row in place.revisions if row.revision]
    assert set(kept) == {row.id for row in good}, "revisions with a fault are not even compared"
    for row in good:
        word = row.revision.split()[1]
        assert kept[row.id]["kept"] == (word == "better")
        assert kept[row.id]["p_revision"] == pytest.approx(1 / (1 + 2.718281828 ** -GRADES[word]))
        first = next(r.text for r in place.responses if r.id == row.response_id)
        assert kept[row.id]["comparison_id"] == Comparison.of(TALK, first, row.revision).id
        assert set(kept[row.id]["by_principle"]) == {"good", "kind"}
    assert (summary["revisions"], summary["kept"], summary["kept_rate"]) == (4, 2, 0.5)
    assert [counts["kept_rate"] for counts in summary["by_round"].values()] == [0.5, 0.5]
    assert summary["calls_made"] == 2 * (3 + 4), "a response is graded once for all its revisions"


def test_a_rerun_and_a_threshold_cost_nothing(place):
    place.filter()
    before = place.kept()
    summary = json.loads(place.filter().stdout)
    assert (summary["calls_made"], summary["calls_kept"]) == (0, 14)
    assert place.kept() == before
    summary = json.loads(place.filter("--set", "filter.threshold=0.9").stdout)
    assert (summary["calls_made"], summary["kept"]) == (0, 0)


def test_a_new_revision_is_judged_and_the_rest_is_not(place):
    place.filter()
    rows = read_jsonl(place.path / "revisions.jsonl")
    rows[2] |= {"revision": "v1 better", "fault": None}
    write_jsonl(place.path / "revisions.jsonl", rows)
    summary = json.loads(place.filter().stdout)
    assert (summary["calls_made"], summary["revisions"]) == (0, 5), "that text has its grades"
    rows[2] |= {"revision": "another better", "fault": None}
    write_jsonl(place.path / "revisions.jsonl", rows)
    assert json.loads(place.filter().stdout)["calls_made"] == 2


def test_a_revision_without_a_label_is_not_kept(place):
    place.judge_by(
        [
            {"match": r"\]\nv\d+ better", "text": "I could not say."},
            {"match": "", "logprobs": {"Yes": -0.1, "No": -2.0}},
        ]
    )
    result = place.filter()
    assert result.exit_code == 3, result.stdout
    assert "unparsed" in result.stderr
    better = {row.id for row in place.revisions if row.revision and "better" in row.revision}
    for name in better:
        row = place.kept()[name]
        assert (row["kept"], row["p_revision"], row["fault"]) == (False, None, "unparsed")
    assert json.loads(result.stdout)["labels_null"] == {"unparsed": 2}


def test_without_a_constitution_of_its_own_it_takes_the_one_of_revise(place):
    named = place.filter()
    result = place.filter("--set", f"revise.constitution={place.constitution}")
    assert json.loads(result.stdout)["calls_made"] == 0
    assert json.loads(result.stdout)["by_round"] == json.loads(named.stdout)["by_round"]


def test_bad_input_is_one_line(place):
    (place.path / "revisions.jsonl").write_text("")
    assert "revisions.jsonl: got no revision without a fault" in place.filter().stderr
    (place.path / "revisions.jsonl").unlink()
    assert "revisions.jsonl: got no such file" in place.filter().stderr


def test_revisions_of_other_responses_are_one_line(place):
    write_jsonl(place.path / "responses.jsonl", [])
    result = place.filter()
    assert result.exit_code == 1
    assert "revisions.jsonl: response_id: got " in result.stderr
    assert "expected the id of a responses.jsonl row" in result.stderr
