"""The claims of `tests/bench/`, at a size that a test suite can bear."""

from __future__ import annotations

import pytest

from tests.bench import edit, journal_resume
from tests.support.clock import slowdown


@pytest.mark.slow
def test_fifty_thousand_answers_are_resumed_in_bounded_time_and_memory(tmp_path):
    found = journal_resume.measure(comparisons=6250, missing=50, folder=tmp_path)
    assert found["rows"] == 50_000
    assert (
        found["first_ask_s"] < 6 * slowdown()
    )  # 1 s is a twentieth of the target, the rest is the start
    assert found["run_mb"] < 200  # of which about 70 are the start


@pytest.mark.slow
def test_each_edit_costs_its_own_calls(tmp_path):
    for name, calls, due, _ in edit.measure(comparisons=10, folder=tmp_path):
        assert calls == due, name
