"""The audit on the report's page."""

from __future__ import annotations

import json

import pytest

from tests.support.full_run import labelled_run

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("krippendorff")

from aif.auditing.audit import audit
from aif.auditing.schema import Audit
from aif.errors import InputError
from aif.progress import Progress
from aif.report import report
from aif.run import Run
from tests.report.test_report import Parsed, written
from tests.support.schema import missing


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    run = labelled_run(tmp_path_factory.mktemp("audited") / "run")
    audit(run, Progress(quiet=True))
    return run


def page_of(run: Run, **changes) -> str:
    """The page with an audit that was changed."""
    before = run.file("audit.json").read_text()
    state = json.loads(before)
    state["judges"][0] |= changes
    run.write_state("audit", state)
    try:
        report(run, Progress(quiet=True))
    finally:
        run.file("audit.json").write_text(before)
    return written(run)


def test_the_page_has_the_judges(run):
    state = run.state("audit")
    summary = report(run, Progress(quiet=True))
    page = Parsed(written(run))
    assert "audit" in summary["parts"]
    assert {"audit", "audit-h", "audit-agreement-title"} <= set(page.ids())
    share = f"{100 * state['judges'][0]['agreement']['mean']:.1f}"
    assert share in page.text().replace("\N{NO-BREAK SPACE}", " ")
    for name in state["judges"][0]["by_principle"]:
        assert ("td", name) in page.held
    assert ("a", "Audit") in page.held


def test_a_run_without_an_audit_says_nothing_of_it(tmp_path):
    bare = labelled_run(tmp_path / "bare")
    assert "audit" not in report(bare, Progress(quiet=True))["parts"]
    assert "audit" not in Parsed(written(bare)).ids()


def test_names_from_the_file_are_text(run):
    name = "<img src=x onerror=alert(1)>\u202e"
    canaries = {"empty": {"flips": 2, "rate": {"mean": 0.4, "n": 5}, "null": 1}}
    page = page_of(run, name=name, canaries=canaries)
    assert "<img" not in page
    parsed = Parsed(page)
    assert any("<img src=x" in text for tag, text in parsed.held if tag == "th")
    assert "\u202e" not in "".join(text for _, text in parsed.held)
    assert "2 of 5, 1 null" in parsed.text()


def test_of_a_folder_the_page_names_the_last_two_parts(run):
    own = {"judge": {"mean": 0.7, "n": 4}, "people": {"mean": 0.5, "n": 4}}
    fitted = {"temperature": 2.0, "ece": 0.01, "ece_before": 0.2}
    page = page_of(run, name="/home/someone/models/judge", self_preference=own, temperature=fitted)
    assert "someone" not in page
    assert "models/judge" in page


def test_an_audit_with_nothing_in_it_is_no_error(tmp_path):
    bare = labelled_run(tmp_path / "bare")
    for state in ({}, {"judges": [{}]}, {"judges": [{"agreement": {}, "position": {}}]}):
        bare.write_state("audit", state)
        assert "audit" in report(bare, Progress(quiet=True))["parts"]
    bare.write_state("audit", {"judges": "nobody"})
    with pytest.raises(InputError, match="judges"):
        report(bare, Progress(quiet=True))


def test_the_audit_has_every_key_that_the_page_reads(run):
    # A rate at equal length is fitted, so it has no count; nobody asked for canaries here.
    absent = {"Estimate.bound", "Estimate.n", "JudgeCard.canaries"}
    assert set(missing(Audit, run.state("audit"))) == absent
