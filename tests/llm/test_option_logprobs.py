"""Which tokens of an answer speak for an option: at its end, and where one token is not enough."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aif.llm import Ask, openai_format
from aif.llm.option_logprobs import TokenLogprobs, begun, read_options

AB = ("A", "B")
TEN = tuple(str(n) for n in range(1, 11))
REASONED = Ask("k", messages=[{"role": "user", "content": "?"}], options=AB, lead="Verdict:")
JSON = Ask("k", messages=[{"role": "user", "content": "?"}], options=AB, schema={"x": 1})
RATING = Ask("k", text="?", options=TEN)


def tokens(*steps: str | tuple[str, dict[str, float]]) -> TokenLogprobs:
    """Tokens with the probabilities of what might stand in their place; a text alone is sure."""
    pairs = [(step, {step: 0.99}) if isinstance(step, str) else step for step in steps]
    listed = [[(token, math.log(p)) for token, p in of.items()] for _, of in pairs]
    return TokenLogprobs([token for token, _ in pairs], lambda i: (listed[i], []))


def read(ask: Ask, *steps, text: str | None = None) -> dict[str, float] | None:
    listed = tokens(*steps)
    logprobs = read_options(ask, "".join(listed.texts) if text is None else text, listed)
    return None if logprobs is None else {name: math.exp(value) for name, value in logprobs.items()}


SURE = {" A": 0.7, " B": 0.2}


def test_the_verdict_is_read_from_the_end():
    early = (" A", {" A": 0.01, " B": 0.98})
    p = read(REASONED, "Response", early, " wins", ".\n", "Verdict", ":", (" A", SURE))
    assert p == pytest.approx({"A": 0.7, "B": 0.2})
    assert read(REASONED, "Verdict", ":", (" A", SURE), " no", " wait") is None
    assert read(REASONED, "Ver", "dict", ":", (" A", SURE), ".", "\n") == pytest.approx(p)


def test_hidden_reasons_before_and_an_end_token_behind_do_not_shift_it():
    steps = ["hidden", "\nVerdict", ":", " B", "\n", "Verdict", ":", (" A", SURE), "<|im_end|>"]
    assert read(REASONED, *steps, text="\nVerdict: A") == pytest.approx({"A": 0.7, "B": 0.2})
    cut = ["caf", "\\xc3", "\\xa9", "\nVerdict", ":", (" A", SURE)]
    assert read(REASONED, *cut, text="café\nVerdict: A") == pytest.approx({"A": 0.7, "B": 0.2})


def test_tokens_that_are_not_those_of_the_text_say_nothing():
    assert read(REASONED, "Verdict", ":", " B", text="Verdict: A") is None
    assert read(REASONED, text="Verdict: A") is None
    joined = ("dict: A", {"dict: A": 0.9, "dict: B": 0.1})
    assert read(REASONED, "Ver", joined) is None, "an option within a token cannot be told apart"


def test_in_json_the_verdict_is_the_key_and_not_the_reasons():
    opening = '{"reasoning": "\\"verdict\\": \\"B\\"", "verdict": '
    bare = ('"', ("A", {"A": 0.6, "B": 0.3}), '"}')
    glued = (('"A', {'"A': 0.6, '"B': 0.3}), '"}')
    for ending in (bare, glued):
        assert read(JSON, opening, *ending) == pytest.approx({"A": 0.6, "B": 0.3})
    assert read(JSON, opening, '"', "A", '"') is None, "cut off"


def test_ten_is_one_then_nought_where_the_tokenizer_writes_it_so():
    first = {"1": 0.6, "9": 0.3}
    p = read(RATING, ("1", first), ("0", {"0": 0.75, "<end>": 0.25}))
    assert p == pytest.approx({"1": 0.15, "9": 0.3, "10": 0.45})
    p = read(RATING, " ", ("1", first), ("<end>", {"0": 0.25, "<end>": 0.7}))
    assert p == pytest.approx({"1": 0.45, "9": 0.3, "10": 0.15})
    spaced = read(RATING, ("1", first), (" 0", {" 0": 0.9, "0": 0.05}))
    assert spaced["10"] == pytest.approx(0.03), "what stands behind a space is no digit of it"


def test_ten_is_one_token_where_it_is_listed():
    p = read(RATING, ("10", {"10": 0.5, "1": 0.2, "8": 0.1}))
    assert p == pytest.approx({"10": 0.5, "1": 0.2, "8": 0.1})


def test_a_one_that_may_be_a_ten_is_left_out_or_leaves_nothing():
    assert read(RATING, ("8", {"8": 0.9, "1": 0.01})) == pytest.approx({"8": 0.9})
    assert read(RATING, ("8", {"8": 0.5, "1": 0.4})) is None
    assert read(RATING, ("1", {"1": 0.9, "8": 0.05})) is None, "nothing tells what stands behind"
    assert read(RATING, " ", "\n") is None
    assert read(RATING, ("The", {"The": 0.9, "I": 0.1})) is None


@given(st.lists(st.floats(0.001, 0.09), min_size=10, max_size=10), st.floats(0.01, 0.99))
def test_what_is_spelled_keeps_its_probability(shares, nought):
    first = {str(n): p for n, p in enumerate(shares, 1) if n < 10}
    first["1"] += shares[9]
    p = read(RATING, ("1", first), ("0", {"0": nought, "<end>": 1 - nought}))
    assert math.fsum(p.values()) == pytest.approx(math.fsum(shares))
    assert p["10"] == pytest.approx(first["1"] * nought)


def test_only_options_that_begin_alike_need_more_than_a_token():
    assert begun(TEN) == {"1"}
    assert begun(AB) == begun(("Yes", "No")) == set()


# ---- on the wire


def reply(steps: TokenLogprobs, **more) -> bytes:
    content = [
        {"token": token, "logprob": steps.at(i)[0][0][1]}
        | {"top_logprobs": [{"token": t, "logprob": p} for t, p in steps.at(i)[0]]}
        for i, token in enumerate(steps.texts)
    ]
    choice = {"message": {"content": "".join(steps.texts)}, "finish_reason": "stop"}
    return json.dumps({"choices": [choice | {"logprobs": {"content": content}} | more]}).encode()


def test_long_reasons_ask_for_few_alternatives_and_structure_for_a_schema():
    sent = openai_format.body(REASONED, "m", logprobs=True)
    assert (sent["logprobs"], sent["top_logprobs"]) == (True, 5)
    assert "response_format" not in sent
    sent = openai_format.body(JSON, "m", logprobs=True)
    schema = {"name": "verdict", "strict": True, "schema": {"x": 1}}
    assert sent["response_format"] == {"type": "json_schema", "json_schema": schema}


def test_a_reasoned_reply_has_its_log_probabilities_at_the_end():
    raw = reply(tokens("Hm", ".\n", "Verdict", ":", (" A", SURE)))
    answer = openai_format.read(REASONED, raw, model=None, logprobs=True)
    assert (answer.logprobs, answer.fault) == (None, None)
    (end,) = answer.ends
    assert end == pytest.approx({"A": math.log(0.7), "B": math.log(0.2)})
    assert openai_format.read(REASONED, raw, model=None, logprobs=False).ends == ()


def test_a_reply_without_its_verdict_or_cut_before_it_has_none():
    for steps in (("Hm", " A"), ("Verdict", ":", " A", " or", " B")):
        raw = reply(tokens(*steps), finish_reason="length")
        answer = openai_format.read(REASONED, raw, model=None, logprobs=True)
        assert (answer.ends, answer.finish, answer.fault) == ((), "length", None)


@pytest.mark.parametrize("value", ["nan", None, True, 3.0, [1]])
def test_a_log_probability_that_is_no_number_is_malformed_at_the_end_too(value):
    body = json.loads(reply(tokens("Verdict", ":", (" A", SURE))))
    last = body["choices"][0]["logprobs"]["content"][-1]
    last["top_logprobs"][1]["logprob"] = value
    answer = openai_format.read(REASONED, json.dumps(body).encode(), model=None, logprobs=True)
    assert (answer.fault, answer.ends, answer.texts) == ("malformed", (), ())


def test_a_stop_string_that_a_server_does_not_heed_does_not_move_the_verdict():
    steps = tokens("Hm", "\nVerdict", ":", (" A", SURE), "\n\n", "Verdict", ":", " B")
    ask = Ask("k", messages=REASONED.messages, options=AB, lead="Verdict:", stop=("\n\n",))
    answer = openai_format.read(ask, reply(steps), model=None, logprobs=True)
    assert answer.texts == ("Hm\nVerdict: A",)
    assert answer.ends[0]["A"] == pytest.approx(math.log(0.7))
