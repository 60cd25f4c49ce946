"""Records seen from the other response, and labels without a number."""

from __future__ import annotations

import pytest

from aif.store.records import Comparison, Label, Verdict

PAIR = Comparison.of([{"role": "user", "content": "p"}], "x", "y")


def verdict(order: str, p_first: float | None) -> Verdict:
    fault = "refused" if p_first is None else None
    return Verdict("v", PAIR.id, "kind", order, "judge", "A", p_first, fault, {"total": 3})


def test_a_comparison_with_the_other_response_first_is_another_one_of_the_same_prompt():
    other = PAIR.swapped()
    assert (other.first, other.second) == ("y", "x")
    assert other == Comparison.of(PAIR.prompt, "y", "x") != PAIR
    assert other.prompt_id == PAIR.prompt_id
    assert other.swapped() == PAIR


@pytest.mark.parametrize(("order", "expected"), [("ab", "ba"), ("ba", "ab"), ("a", "b")])
def test_a_verdict_is_of_the_other_order_and_for_the_other_response(order, expected):
    row = verdict(order, 0.25).swapped()
    assert (row.order, row.p_first) == (expected, 0.75)
    assert row.swapped() == verdict(order, 0.25)
    assert verdict(order, None).swapped() == verdict(expected, None)


def test_a_label_is_for_the_other_response_in_every_number():
    row = Label(PAIR.id, 0.25, None, 4, 1.0, {"kind": 0.125, "true": None}, {"one": 1.0})
    expected = Label(PAIR.id, 0.75, None, 4, 1.0, {"kind": 0.875, "true": None}, {"one": 0.0})
    assert row.swapped() == expected
    assert expected.swapped() == row


def test_a_label_without_a_number_has_a_fault_and_no_more():
    row = Label.null(PAIR.id, "tied")
    assert (row.p_first, row.fault, row.n_verdicts) == (None, "tied", 0)
    assert row.swapped() == row
