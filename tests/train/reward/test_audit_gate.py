"""`reward.require_audit`: nothing is learned from labels of a judge that nobody has audited."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aif.cli.verbs import app
from aif.config.settings import Settings
from aif.config.toml import checked
from aif.errors import AifError, InputError
from aif.run import Run
from aif.store.provenance import identity
from aif.train.reward.audit_gate import check_audit
from tests.conftest import write_constitution, write_jsonl

USED = {
    "judge": {"model": "openai:j"},
    "protocol": "pairwise",
    "template": "t",
    "constitution": {"file": "c.toml", "digest": "d"},
}
CARD = {
    "used": identity(USED),
    "agreement": {"mean": 0.75, "n": 200},
    "position": {"bias": -0.1},
    "fault_rate": 0.01,
}
REQUIRED = {"agreement": 0.7, "position_bias": 0.2, "fault_rate": 0.02}


@pytest.fixture
def gated(tmp_path):
    """Check a run with these labels, cards and demands."""

    def check(cards, required=REQUIRED, used=USED, **reward):
        tables = {"reward": {"require_audit": required} | reward}
        run = Run(tmp_path, checked(Settings, tables, "test"))
        if used is not None:
            run.write_state("label", used)
        if cards is not None:
            run.write_state("audit", {"judges": cards})
        check_audit(run)

    return check


def test_a_judge_that_is_good_enough_passes(gated):
    gated([{**CARD, "used": {"judge": "another"}}, CARD])
    gated([CARD], required={"agreement": 0.75, "position_bias": 0.1, "fault_rate": 0.01})
    gated([CARD], required={})


def test_without_a_demand_nothing_is_looked_at(gated, tmp_path):
    check_audit(Run(tmp_path, Settings()))
    gated(None, data={"human.jsonl": 1.0})  # learns from no labels


@pytest.mark.parametrize(
    ("change", "shortfall"),
    [
        ({"agreement": {"mean": 0.69, "n": 9}}, "agreement 0.690, at least 0.7 is required"),
        ({"agreement": {"mean": None, "n": 0}}, "agreement unknown, at least 0.7 is required"),
        ({"position": {"bias": -0.3}}, "position bias -0.300, at most 0.2 is required"),
        ({"position": {"bias": None}}, "position bias unknown, at most 0.2 is required"),
        ({"fault_rate": 0.03}, "fault rate 0.030, at most 0.02 is required"),
        ({"fault_rate": None}, "fault rate unknown, at most 0.02 is required"),
    ],
)
def test_each_shortfall_is_named(gated, change, shortfall):
    with pytest.raises(AifError) as error:
        gated([CARD | change])
    assert str(error.value).endswith(f"does not hold: {shortfall}")


def test_a_judge_that_grades_one_by_one_has_no_position_to_be_biased_to(gated):
    gated([CARD | {"position": None}])


def test_an_audit_has_to_be_there(gated):
    with pytest.raises(AifError, match=r"audit\.json: not there"):
        gated(None)


@pytest.mark.parametrize(
    "change",
    [
        {"judge": {"model": "openai:k"}},
        {"protocol": "pointwise"},
        {"template": "u"},
        {"constitution": {"file": "c.toml", "digest": "e"}},
        {"panel": {"openai:k": {}}},
        {"consensus": {"rule": "majority"}},
        {"escalation": {"below": 0.2, "by": "panel"}},
    ],
)
def test_an_audit_of_another_judge_does_not_count(gated, change):
    with pytest.raises(AifError, match="has no card of the judge"):
        gated([CARD], used=USED | change)


def test_labels_of_nobody_knows_whom_are_not_those_of_a_recorded_judge(gated):
    with pytest.raises(AifError, match="has no card of the judge"):
        gated([CARD | {"used": {}}], used=None)


def test_a_demand_that_is_none(tmp_path):
    for wrong in ({"agreemnt": 0.7}, {"agreement": 70}, {"agreement": "much"}):
        with pytest.raises(InputError, match="require_audit"):
            checked(Settings, {"reward": {"require_audit": wrong}}, "run.toml")


def test_from_label_to_reward(tmp_path: Path):
    """The verbs: no audit, one that holds, one that fails."""

    def aif(*arguments: object):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    pytest.importorskip("torch")
    pytest.importorskip("krippendorff")
    rows = [{"prompt": f"p{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(8)]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", rows)
    write_constitution(tmp_path / "c.toml", {"kind": "Kinder?"})
    rules = [{"match": r"response A \w+\]\nbad", "logprobs": {"A": -2.0, "B": -0.1}},
             {"match": "", "logprobs": {"A": -0.1, "B": -2.0}}]  # fmt: skip
    judge = f"scripted:{write_jsonl(tmp_path / 'rules.jsonl', rules)}"
    files = ["--constitution", tmp_path / "c.toml", "--judge", judge, "--pairs", pairs]
    run = tmp_path / "run"
    assert aif("label", "--out", run, *files).exit_code == 0

    def reward(least: float) -> str:
        required = f"reward.require_audit={{agreement={least}}}"
        model = ["--set", f"reward.model={tmp_path / 'no-model'}"]  # where it ends, if let through
        done = aif("reward", run, "--set", required, *model)
        assert done.exit_code == 1
        (line,) = done.stderr.strip().splitlines()
        return line

    assert "audit.json: not there" in reward(0.5)
    done = aif("audit", "--out", run, *files, "--json", "--set", "audit.resamples=100")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["judges"][0]["agreement"]["mean"] == 1
    assert "(no such folder)" in reward(0.9)
    audit = json.loads((run / "audit.json").read_text())
    audit["judges"][0]["agreement"]["mean"] = 0.6
    (run / "audit.json").write_text(json.dumps(audit))
    assert "agreement 0.600, at least 0.9 is required" in reward(0.9)
