"""Requests as they are sent, and responses read strictly: an answer or a fault, nothing between."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aif.llm import Ask, openai_format
from aif.store.records import FAULTS, LONE_SURROGATE

CHAT = Ask("k", messages=[{"role": "user", "content": "hi"}], options=("A", "B"))
TEXT = Ask("k", text="hi", options=("Yes", "No"))


def chat_reply(top: dict[str, float] | None = None, **message: object) -> dict:
    """A chat completion that says "A"; `top` are the log-probabilities of its first token."""
    logprobs = None
    if top is not None:
        listed = [{"token": token, "logprob": value} for token, value in top.items()]
        logprobs = {"content": [{**listed[0], "top_logprobs": listed}]}
    body = {"role": "assistant", "content": "A"} | message
    choice = {"index": 0, "message": body, "logprobs": logprobs, "finish_reason": "stop"}
    return {"model": "m", "choices": [choice], "usage": {"prompt_tokens": 3}}


def read(ask: Ask, reply: object, model: str | None = None):
    return openai_format.read(ask, json.dumps(reply).encode(), model=model, logprobs=True)


def test_chat_asks_for_twenty_logprobs_and_text_for_five():
    assert openai_format.body(CHAT, "m", logprobs=True) == {
        "model": "m",
        "messages": CHAT.messages,
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": True,
        "top_logprobs": 20,
    }
    sent = openai_format.body(TEXT, "m", logprobs=True)
    assert (sent["prompt"], sent["logprobs"]) == ("hi", 5)
    assert (openai_format.path(CHAT), openai_format.path(TEXT)) == (
        "/chat/completions",
        "/completions",
    )


def test_logprobs_are_not_asked_for_without_options_or_when_switched_off():
    assert "logprobs" not in openai_format.body(CHAT, "m", logprobs=False)
    assert "logprobs" not in openai_format.body(Ask("k", text="hi"), "m", logprobs=True)


def test_stop_strings_are_sent():
    assert openai_format.body(Ask("k", text="hi", stop=("\n###",)), "m", logprobs=True)["stop"] == [
        "\n###"
    ]
    assert "stop" not in openai_format.body(Ask("k", text="hi"), "m", logprobs=True)


@pytest.mark.parametrize(
    ("sent", "finish", "texts", "finished"),
    [
        (["one\n###two###", "a\n###"], "length", ("one", "a"), "stop"),
        (["one\n###two", "cut sh"], "length", ("one", "cut sh"), "length"),
        (["one"], "length", ("one",), "length"),
    ],
)
def test_a_server_that_does_not_heed_a_stop_string_is_cut(sent, finish, texts, finished):
    choices = [{"index": n, "text": t, "finish_reason": finish} for n, t in enumerate(sent)]
    ask = Ask("k", text="hi", samples=len(sent), stop=("never", "\n###"))
    answer = openai_format.read(
        ask, json.dumps({"choices": choices}).encode(), model=None, logprobs=False
    )
    assert (answer.texts, answer.finish) == (texts, finished)


@pytest.mark.parametrize(
    ("temperature", "seed", "sent"), [(0.0, 7, None), (1.0, None, None), (1.0, 0, 0), (0.5, 7, 7)]
)
def test_a_seed_goes_with_a_temperature_only(temperature, seed, sent):
    ask = Ask("k", text="hi", temperature=temperature, seed=seed, samples=3)
    body = openai_format.body(ask, "m", logprobs=True)
    assert body.get("seed") == sent
    assert body["n"] == 3


@given(st.text(st.characters(exclude_categories=[]), min_size=1))
def test_any_text_can_be_sent(text):
    sent = json.loads(openai_format.encode({"prompt": text}).decode("utf-8"))["prompt"]
    assert sent == LONE_SURROGATE.sub("\ufffd", text)


def test_variants_of_an_option_add_up():
    top = {"A": math.log(0.5), " a": math.log(0.1), "B": math.log(0.3), "The": math.log(0.05)}
    logprobs = read(CHAT, chat_reply(top)).logprobs
    assert logprobs == pytest.approx({"A": math.log(0.6), "B": math.log(0.3)})


def test_a_missing_option_gets_the_least_listed_logprob():
    top = {"A": math.log(0.6), "The": math.log(0.2), "I": math.log(0.01)}
    assert read(CHAT, chat_reply(top)).logprobs["B"] == pytest.approx(math.log(0.01))


def test_a_missing_option_gets_no_more_than_the_list_leaves():
    top = {"A": math.log(0.6), "The": math.log(0.35)}
    assert read(CHAT, chat_reply(top)).logprobs["B"] == pytest.approx(math.log(0.05))


def test_no_option_among_the_logprobs_leaves_the_text_to_be_parsed():
    answer = read(CHAT, chat_reply({"The": -0.1, "I": -3.0}, content="The first: A"))
    assert (answer.logprobs, answer.texts, answer.fault) == (None, ("The first: A",), None)


def test_a_sampled_token_outside_the_list_counts():
    reply = chat_reply({"The": math.log(0.9)})
    reply["choices"][0]["logprobs"]["content"][0] |= {"token": "B", "logprob": math.log(0.04)}
    assert read(CHAT, reply).logprobs == pytest.approx({"B": math.log(0.04), "A": math.log(0.06)})


def test_an_empty_text_is_no_fault_where_the_options_have_logprobs():
    answer = read(CHAT, chat_reply({"A": -0.1, "B": -3.0}, content=None))
    assert (answer.fault, answer.texts) == (None, ("",))


@pytest.mark.parametrize("value", [0.5, "0", None, True, float("inf")])
def test_a_logprob_that_is_none_is_malformed(value):
    answer = read(CHAT, chat_reply({"A": value, "B": -1.0}))
    assert (answer.fault, answer.logprobs) == ("malformed", None)


@pytest.mark.parametrize("value", [-9999.0, -1e300, -float("1e308"), -(10**400)])
def test_an_impossible_token_has_a_finite_logprob(value):
    logprobs = read(CHAT, chat_reply({"A": -0.01, "B": value})).logprobs
    assert math.isfinite(logprobs["A"])
    assert math.isfinite(logprobs["B"])
    assert logprobs["B"] < -4


def test_the_older_endpoints_shape():
    choice = {
        "text": " Yes",
        "logprobs": {
            "tokens": [" Yes"],
            "token_logprobs": [math.log(0.7)],
            "top_logprobs": [{" Yes": math.log(0.7), " No": math.log(0.2)}],
        },
        "finish_reason": "length",
    }
    answer = read(TEXT, {"model": "m", "choices": [choice]})
    assert answer.logprobs == pytest.approx({"Yes": math.log(0.7), "No": math.log(0.2)})
    assert (answer.texts, answer.finish) == ((" Yes",), "length")


def test_samples_are_in_the_order_of_their_index_and_a_cut_one_shows():
    ask = Ask("k", text="hi", samples=2)
    choices = [
        {"index": 1, "text": "one", "finish_reason": "length"},
        {"index": 0, "text": "zero", "finish_reason": "stop"},
    ]
    answer = read(ask, {"choices": choices})
    assert (answer.texts, answer.finish) == (("zero", "one"), "length")


@pytest.mark.parametrize(
    "error", ["the engine died", {"message": "the engine died"}, {"detail": "the engine\ndied"}]
)
def test_an_error_beside_choices_is_malformed(error):
    answer = read(CHAT, chat_reply({"A": -0.1, "B": -3.0}) | {"error": error})
    assert (answer.fault, answer.detail) == ("malformed", "error: the engine died")


@pytest.mark.parametrize(
    ("requested", "echoed", "same"),
    [
        ("gpt-4.1", "gpt-4.1-2025-04-14", True),
        ("org/Small-7B", "small-7b", True),
        ("/models/small-7b/", "small-7b", True),
        ("gpt-4.1", "gpt-4o", False),
        ("org/small-7b", "org/large-70b", False),
    ],
)
def test_which_model_may_answer(requested, echoed, same):
    assert openai_format.same_model(requested, echoed) is same
    answer = read(CHAT, chat_reply() | {"model": echoed}, model=requested)
    assert (answer.fault is None) is same
    assert same or (answer.fault, answer.texts) == ("wrong_model", ())


def test_a_server_that_names_no_model_is_believed():
    reply = chat_reply()
    del reply["model"]
    assert read(CHAT, reply, model="m").texts == ("A",)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
PLACES = [
    (),
    ("error",),
    ("model",),
    ("usage",),
    ("usage", "prompt_tokens"),
    ("choices",),
    ("choices", 0),
    ("choices", 0, "index"),
    ("choices", 0, "finish_reason"),
    ("choices", 0, "message"),
    ("choices", 0, "message", "content"),
    ("choices", 0, "message", "refusal"),
    ("choices", 0, "logprobs"),
    ("choices", 0, "logprobs", "content"),
    ("choices", 0, "logprobs", "content", 0),
    ("choices", 0, "logprobs", "content", 0, "token"),
    ("choices", 0, "logprobs", "content", 0, "top_logprobs"),
    ("choices", 0, "logprobs", "content", 0, "top_logprobs", 0),
    ("choices", 0, "logprobs", "content", 0, "top_logprobs", 0, "logprob"),
]


def planted(reply: dict, place: tuple, junk: object) -> object:
    """The reply with junk in one place."""
    if not place:
        return junk
    holder = reply
    for step in place[:-1]:
        holder = holder[step]
    holder[place[-1]] = junk
    return reply


@given(st.sampled_from(PLACES), JSON)
def test_junk_anywhere_is_an_answer_or_a_known_fault(place, junk):
    reply = planted(chat_reply({"A": -0.1, "B": -3.0}), place, junk)
    check_sound(openai_format.read(CHAT, json.dumps(reply).encode(), model="m", logprobs=True))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_known_fault(raw):
    answer = openai_format.read(CHAT, raw, model="m", logprobs=True)
    check_sound(answer)
    assert answer.fault == "malformed"


def check_sound(answer) -> None:
    """Either a fault with a reason and nothing else, or something to read."""
    if answer.fault is not None:
        assert answer.fault in FAULTS
        assert answer.detail
        assert "\n" not in answer.detail
        assert (answer.texts, answer.logprobs) == ((), None)
        return
    assert len(answer.texts) == 1
    assert isinstance(answer.texts[0], str)
    answer.texts[0].encode()  # no surrogate is left
    if answer.logprobs is None:
        assert answer.texts[0].strip()
    else:
        assert set(answer.logprobs) == {"A", "B"}
        assert all(math.isfinite(value) and value <= 0 for value in answer.logprobs.values())
    assert all(type(n) is int and n >= 0 for n in answer.usage.values())
