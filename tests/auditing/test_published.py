"""Recorded judges of published data sets: the audit's figures are those of the authors' records."""

from __future__ import annotations

import importlib.util

import pytest

from tests.conftest import ROOT

pytest.importorskip("sklearn")
pytest.importorskip("krippendorff")

SCRIPT = ROOT / "tests" / "bench" / "audit_cards.py"


@pytest.fixture(scope="module")
def cards():
    spec = importlib.util.spec_from_file_location("audit_cards", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pandalm(cards, shared_data, tmp_path):
    audit = cards.pandalm(shared_data, tmp_path / "run")
    people = audit["annotators"]
    assert round(100 * people["agreement"]["mean"], 1) == cards.PANDALM["annotators"] == 92.0
    assert round(100 * people["unanimous"], 1) == 88.0
    exact = {card["name"]: round(100 * card["exact"]["mean"], 1) for card in audit["judges"]}
    assert exact == {"gpt35_result": 69.8, "pandalm7b_result": 66.8}
    assert audit["judges"][0]["null"] == {"unparsed": 25}
    assert 0.8 < people["alpha"] < 0.9
    assert 0.4 < audit["alpha"] < 0.6


@pytest.mark.slow
def test_llmbar(cards, shared_data, tmp_path):
    rows = {row["name"]: row for row in cards.llmbar(shared_data, tmp_path / "run", ["Vanilla"])}
    assert len(rows) == 6
    for name, row in rows.items():
        assert row["accuracy"] == pytest.approx(row["published_accuracy"])
        if not name.startswith("PaLM2"):  # of which two pairs without any verdict count as agreeing
            assert row["swap"] == pytest.approx(row["published_swap"])
    assert rows["PaLM2 Vanilla"]["swap"] == pytest.approx(78)  # 80 with them
    assert rows["GPT-4 Vanilla"]["accuracy"] == pytest.approx(95.5)
    assert rows["Falcon Vanilla"]["bias"] > 0.4
