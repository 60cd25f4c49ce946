"""Final answers as models really phrase them, and texts that state none."""

import re
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aif.data import final_answer as answers
from aif.data.final_answer import final_answer, normalise
from tests.support.clock import within

STATED = [
    ("The answer is 18.", "18"),
    ("The answer is $18", "18"),
    ("So the answer is: 18 dollars.", "18"),
    ("Therefore, the final answer is **1,234**.", "1234"),
    ("**Answer:** 18", "18"),
    ("**Answer**: 18", "18"),
    ("_Answer_: 18", "18"),
    ("ANSWER = 18", "18"),
    ("Ans: 18", "18"),
    ("Answer:\n\n18", "18"),
    ("### Final Answer\n\n18", "18"),
    ("**Final Answer**\n\\[ \\boxed{18} \\]", "18"),
    ("The answer is:\n\\[\n18\n\\]", "18"),
    ("Final Answer: The final answer is $18$. I hope it is correct.", "18"),
    ("The answer to the question is 18, since 9 * 2 = 18.", "18"),
    ("The answer would be 18 because she sells 9 eggs at 2 dollars.", "18"),
    ("The answer is therefore 18", "18"),
    ("The answer is approximately 3.10", "3.1"),
    ("The answer is 9 * 2 = 18.", "18"),
    ("The answer is x = 18.", "18"),
    ("The answer is 18!", "18"),
    ("(The answer is 18)", "18"),
    ("[[Answer: 18]]", "18"),
    ("<answer>18</answer>", "18"),
    ("<answer>\n  18 eggs\n</answer> Done.", "18"),
    ("9 * 2 = <<9*2=18>>18\n#### 18", "18"),
    ("#### 18\n\nQuestion: and what else?", "18"),
    ("#### Step 1\nTwo and two.\n#### Step 2\nThe answer is 4.", "4"),
    ("#### yes", "yes"),
    ("The answer is 4.\n#### Check of the result\nIt fits.", "4"),
    ("Thus $\\boxed{18}$.", "18"),
    ("\\boxed{\\text{(B)}}", "b"),
    ("\\boxed{\\frac{1}{2}}", "1/2"),
    ("\\boxed{\\dfrac{x^{2}}{\\sqrt{3}}}", "\\frac{x^{2}}{\\sqrt{3}}"),
    ("\\boxed{-\\frac12}", "-1/2"),
    ("\\boxed{(1, 2)}", "(1,2)"),
    ("\\boxed{18\\text{ dollars}}", "18"),
    ("\\boxed{50\\%}", "50"),
    ("\\boxed{90^\\circ}", "90"),
    ("18 is the answer.", "18"),
    ("The correct answer is (B).", "b"),
    ("The answer is (B) 42.", "b"),
    ("Answer: B. Paris", "b"),
    ("Answer: B) Paris", "b"),
    ("The answer is option C, because A is wrong.", "c"),
    ("The correct option is D.", "d"),
    ("My choice is (a)", "a"),
    ("So (B) is correct.", "b"),
    ("Option B is the best choice.", "b"),
    ("B is the correct answer.", "b"),
    ("(A) is cold and (B) is warm.\nB", "b"),
    ("**(B)**", "b"),
    ("It cannot be that. So it must be (C).", "c"),
    ("(C) Paris", "c"),
    ("Yes.", "yes"),
    ("42", "42"),
    ("Counting:\n...\n$1,250.00", "1250"),
    ("The answer is yes, they can.", "yes"),
    ("The answer is No.", "no"),
    ("The answer is the Eiffel Tower.", "eiffel tower"),
    ('The answer is "Paris".', "paris"),
    ("The answer is Paris, France.", "paris, france"),
    ("The answer is St. Louis. It is large.", "st. louis"),
    ("The answer is J. K. Rowling.", "j. k. rowling"),
    ("The answer is 3/4.", "3/4"),
    ("The answer is −5.", "-5"),
    ("The answer is .5", "0.5"),
    ("The answer is 5 million.", "5 million"),
    ("The answer is 9 pm.", "9 pm"),
    ("The answer is 60 miles per hour.", "60"),
    ("The answer is 12 km^2.", "12"),
    ("The answer is 10:30.", "10:30"),
    ("The answer is 3x + 2.", "3x+2"),
    ("The answer is 3 apples and 4 pears.", "3 apples and 4 pears"),
    ("The answers are 3 and 4.", "3 and 4"),
    # the last one stated counts
    ("The answer is 17. Wait, 9 * 2 is 18. The answer is 18.", "18"),
    ("\\boxed{17} is wrong. Answer: 18", "18"),
    ("The answer is 18. The answer is correct.", "18"),
    ("The answer is 18. I don't think the answer is 17.", "18"),
    ("The answer is 18. If the answer is 17, then I am wrong.", "18"),
    ("Answer: Let's think step by step. 9 * 2 = 18. So the answer is 18.", "18"),
]


@pytest.mark.parametrize(("text", "answer"), STATED)
def test_an_answer_is_read(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "I do not know.",
        "What is the answer?",
        "There are 18 eggs, so she makes money.",
        "The answer is",
        "Answer: ?",
        "The answer is not 5",
        "The answer is as follows:",
        "Answer: Let's think step by step.",
        "I am not sure whether the answer is 5.",
        "I don't think B is the answer.",
        "(B) is not correct.",
        "It is neither of them, not even (B).",
        "(A) London\n(B) Paris",
        "Either (A) or (B).",
        "The answer is a question of taste in which many people who should know better, or who at "
        "least might be expected to, differ.",
        "\\boxed{18",
        "\\boxed{}",
    ],
)
def test_what_states_no_answer_has_none(text):
    assert final_answer(text) is None


@pytest.mark.parametrize(
    "same",
    [
        ["3", "3.0", "3.", "+3", "03", "$3.00", "3 %", "3%", "3 eggs", "x = 3", "**3**", "3°"],
        ["1000", "1,000", "$1,000.00", "1000 dollars", "1{,}000", "1000\\text{ miles}"],
        ["1/2", "1 / 2", "\\frac{1}{2}", "\\tfrac12", "$\\frac{1}{2}$"],
        ["0", "-0", "0.00", "+0"],
        ["B", "(B)", "b", "(b)", "B)", "B.", "(B) Paris", "B: Paris", "Option B"],
        ["the moon", "The Moon.", '"Moon"', "*moon*", "a moon"],
        ["(1, 2)", "(1,2)", "$(1, 2)$", "\\left(1, 2\\right)"],
    ],
)
def test_spellings_of_one_answer_are_one(same):
    assert len({normalise(answer) for answer in same}) == 1


@pytest.mark.parametrize(
    "apart",
    [
        ["1/2", "0.5", "12", "2 1/2", "21/2"],
        ["5", "5 million", "5 thousand", "5x", "5^2", "5 pi", "-5", "5/6", "50"],
        ["9 am", "9 pm", "9:00"],
        ["(0, 1]", "[0, 1)", "[0, 1]", "(0, 1)"],
        ["x = 1, y = 2", "y = 2", "x >= 2"],
        ["(1,200)", "(1200)"],
        ["(a) 1 (b) 2", "(a) 1 (b) 3"],
        ["12345678901234567890.1", "12345678901234567890.2"],
        ["1 to 2", "1 or 2", "1, 2", "12"],
        ["2\\frac{1}{2}", "\\frac{21}{2}"],
    ],
)
def test_what_differs_stays_apart(apart):
    assert len({normalise(answer) for answer in apart}) == len(apart)


WORDS = [
    "\n", " ", "\t", "answer", "is", "the", "not", ":", "=", ".", ",", "$", "####", "\\boxed{", "}",
    "{", "(", ")", "(B)", "B", "1,000", "3.5", "-", "/", "%", "\\frac", "\\text{", "option",
    "correct", "to", "*", "_", "<answer>", "</answer>", "if", "n't", "eggs", "🙂",
]  # fmt: skip
noise = st.text() | st.lists(st.sampled_from(WORDS)).map(" ".join) | st.text("answeris:. \n\\{}()")


@given(noise)
def test_no_text_breaks_it(text):
    for answer in (final_answer(text), normalise(text)):
        assert answer is None or answer


HOSTILE = [
    "answer is ", "answer: ", "answer answer ", "the answer to ", "the answer of 5 to a ", "#### ",
    "####", "# \n", "\\boxed{", "{", "}", "\\frac{", "\\text{a", "(", "(B) ", "(B", "1", "1,", "1.",
    "1 ", "a", "a ", "aa ", "5 aa ", "\n", " ", "*", "_", "not a ", "is the ", "if ", "Mr. ", "-",
    "A is the correct ", "<answer>", "about ", "= ", "$", "'",
]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_a_long_text_takes_no_time(piece):
    repeated = piece * (1_000_000 // len(piece))
    for text in (repeated, "The answer is " + repeated, f"The answer is 5 {repeated[:80]}\n"):
        with within(1):
            final_answer(text)
            normalise(text[-1000:])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6))
def test_no_mix_of_words_takes_long(words):
    piece = "".join(words) + " "
    with within(1):
        final_answer(piece * (1_000_000 // len(piece)))


def test_a_pattern_takes_the_place_of_the_usual_phrases():
    text = "The answer is 1.\nRESULT 2.0\nRESULT 3,000 eggs\nThe answer is 4."
    assert final_answer(text, re.compile(r"RESULT (.+)")) == "3000"
    assert final_answer(text, re.compile(r"NOTHING (.+)")) is None
    assert final_answer("a", re.compile(r"a|(b)")) is None  # the group took no part


def test_a_pattern_that_would_never_end_is_stopped(monkeypatch):
    monkeypatch.setattr(answers, "PATTERN_S", 0.2)
    with within(2), pytest.raises(TimeoutError):
        final_answer("a" * 60 + "b", re.compile(r"((?:a+)+)$"))
    assert final_answer("a", re.compile("(a)")) == "a"


def test_a_pattern_works_in_a_thread():
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(final_answer("so: 5", re.compile(r"so: (\d)")))
    )
    thread.start()
    thread.join()
    assert answers == ["5"]
