"""Reading verdicts from text, held against a thousand recorded judges' answers."""

import json
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aif.llm.verdict_text import is_refusal, parse_choice
from tests.bench import llmbar
from tests.support.clock import within

AB, YES_NO = ("A", "B"), ("Yes", "No")


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("A", "A"),
        (" b\n", "B"),
        ("**B**", "B"),
        ("(A).", "A"),
        ("[[B]]", "B"),
        ('"A"', "A"),
        ("Response B", "B"),
        ("B.", "B"),
        ("B, because it is kinder than A.", "B"),
        ("A: it is kinder. Response B is cold.", "A"),
        ("The answer is (B).", "B"),
        ("My verdict: A", "A"),
        ("Answer: **B**", "B"),
        ("I prefer response A over response B.", "A"),
        ("Response A is better than response B.", "A"),
        ("B is slightly better.", "B"),
        ("At first A is better, but in the end B is better.", "B"),
        ("[[A]] at first, then [[B]]", "B"),
        ("I'd go with B", "B"),
        ("Both are fine, but my choice is B.", "B"),
    ],
)
def test_a_choice_is_read(text, choice):
    assert parse_choice(text, AB) == AB.index(choice)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "both",
        "A and B",
        "A or B",
        "A, B",
        "A/B",
        "A\nB",
        "B.\n\nA.",
        "A: warm.\nB: cold.",
        "Both A and B are equally good.",
        "It is a tie.",
        "C",
        "AB",
        "A comparison cannot be made.",
        "A response that is kinder would do.",
        "I prefer a warm reply.",
        "The answer is a matter of taste.",
        "Answer: A response is due.",
        "A-level work",
        "A.I. models differ",
        "Neither A",
        "A is worse.",
        "A is not better.",
        "I would not choose A.",
        "I don't think A is better.",
        "It is not clear whether A is better.",
    ],
)
def test_what_names_no_option_clearly_has_no_verdict(text):
    assert parse_choice(text, AB) is None


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("Yes", "Yes"),
        ("no.", "No"),
        ("**Yes**", "Yes"),
        ("No, it is cold.", "No"),
        ("Yes: it is kind", "Yes"),
        ("The answer is no.", "No"),
        ("I would say yes.", "Yes"),
        ("Yes and no", None),
        ("No. Yes.", None),
        ("yes/no", None),
        ("I have no idea", None),
        ("There is no such thing.", None),
        ("Not really", None),
        ("Nope", None),
        ("Yesterday", None),
    ],
)
def test_yes_and_no_are_words_of_the_language_too(text, choice):
    assert parse_choice(text, YES_NO) == (None if choice is None else YES_NO.index(choice))


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry", True),
        ("As an AI, I do not judge.", True),
        ("I cannot answer this", True),
        ("A, and I'm sorry for the other", False),
        ("I can see that B is kinder", False),
    ],
)
def test_refusals(text, refusal):
    assert is_refusal(text) == refusal


SAID = "A B a b (a) [[B]] yes no is better not answer : . , - ( * \" ' response the 🙂 \\n"
WORDS = st.sampled_from(SAID.split()).map(lambda word: word.replace("\\n", "\n"))


@given(st.lists(WORDS | st.text(max_size=3), max_size=12).map(" ".join))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_without_an_error_and_the_same_with_space_around(text):
    for options in (AB, YES_NO):
        choice = parse_choice(text, options)
        assert choice in (0, 1, None)
        assert parse_choice(f" \n{text}\t\n", options) == choice


@given(st.lists(WORDS, max_size=8).map(" ".join))
@settings(max_examples=200, deadline=None)
def test_a_text_without_either_option_has_no_verdict(text):
    assert parse_choice(text, ("X", "Y")) is None
    assert parse_choice(text, ("first", "second")) is None


@pytest.mark.parametrize("piece", ["(", "**", "\n", "answer ", "is the ", "A ", "not ", "output "])
def test_a_megabyte_is_read_in_linear_time(piece):
    for size, seconds in ((20_000, 0.5), (1_000_000, 5)):  # what is quadratic takes 40 s here
        text = "x" + piece * (size // len(piece)) + "x"
        with within(seconds):
            parse_choice(text, AB)
            is_refusal(text)


# The recorded winner contradicts the text: its first sentence says "Output (b) is better." and (a)
# was recorded, or the text states several verdicts. (order as shown: "ab" or "ba")
DIFFERENT = {
    ("Falcon", "CoT"): "007ab 074ab",
    ("PaLM2", "CoT"): "000ba 002ba 006ba 007ab 011ab 013ab 018ab 032ab 034ba 035ba 040ab 050ab "
    "057ab 064ba 068ab 071ab 074ab 079ba 085ba 086ab 095ab 095ba",
}


def test_recorded_completions_are_read_as_their_authors_did(shared_data):
    different = defaultdict(set)
    rows = llmbar.read(shared_data / "llmbar", "natural_completions")
    for row in rows:
        for order in ("ab", "ba"):
            if llmbar.parsed_winner(row, order) != row[f"winner_{order}"]:
                item = row["item"].removeprefix("llmbar-Natural-")
                different[row["judge"], row["method"]].add(item + order)
    assert len(rows) == 1800
    assert different == {key: set(items.split()) for key, items in DIFFERENT.items()}


HEADLINES = {  # judge: accuracy over both orders, agreement of the orders, in percent
    "GPT-4": (95.5, 95.0),
    "PaLM2": (83.0, 78.0),
    "LLaMA2": (80.5, 79.0),
    "ChatGPT": (81.5, 71.0),
    "Falcon": (74.0, 52.0),
}

# The published agreement counts an item without a verdict in either order as agreeing.
BOTH_NULL = {
    "CoT": 1,
    "Metrics": 2,
    "Metrics_Reference": 2,
    "Reference": 2,
    "Swap": 1,
    "Swap_CoT": 1,
    "Vanilla": 2,
    "Vanilla_NoRules": 3,
}


def test_the_published_table_comes_out_of_our_aggregation(shared_data):
    rows = llmbar.table(shared_data / "llmbar")
    assert len(rows) == 65
    for row in rows:
        assert row.accuracy == pytest.approx(row.published_accuracy, abs=1e-9), row
        explained = BOTH_NULL[row.method] if row.judge == "PaLM2" else 0
        assert row.both_null == explained
        assert row.agreement == pytest.approx(row.published_agreement - explained, abs=1e-9), row
    headlines = {r.judge: (r.accuracy, r.agreement) for r in rows if r.method == "Vanilla"}
    assert {judge: headlines[judge] for judge in HEADLINES} == HEADLINES


def test_the_benchmark_prints_its_tables(shared_data, capsys):
    llmbar.main(["--data", str(shared_data / "llmbar")])
    out = " ".join(capsys.readouterr().out.split())
    assert "GPT-4 Vanilla 95.5 95.5 95.0 95.0" in out
    assert "3,576 of 3,600" in out
    llmbar.main(["--data", str(shared_data / "llmbar"), "--json"])
    assert len(json.loads(capsys.readouterr().out)["judges"]) == 65
