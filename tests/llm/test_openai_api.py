"""The judge's HTTP client against a local server that misbehaves in every way we know of."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import signal
import socket
import threading
import time
from contextlib import contextmanager

import pytest

from aif.config.settings import LLMSettings
from aif.errors import InputError, Interrupted, JudgeStopped
from aif.llm import Ask, open_llm, pool
from aif.llm.event_loop import Turns
from aif.llm.openai_api import ApiLLM
from tests.support.clock import slowdown, within
from tests.support.server import hash_of, p_of, serving

KEY = "sk-planted-secret-0123456789"


@pytest.fixture(scope="module")
def shared():
    with serving() as server:
        yield server


@pytest.fixture
def server(shared, monkeypatch):
    """The server without faults, without counts, and no key in the environment."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    shared.set_faults()
    shared.reset()
    return shared


def settings(server, **more) -> LLMSettings:
    """Quick to give up, so that a fault takes milliseconds."""
    quick = {"concurrency": 16, "attempts": 3, "timeout_s": 5.0, "max_wait_s": 0.02}
    defaults = {"model": "openai:test-model", "base_url": server.base_url}
    return LLMSettings(**(defaults | quick | more))


def ask(number: object = 0, **more) -> Ask:
    words = [{"role": "user", "content": f"question {number}"}]
    return Ask(str(number), **({"messages": words, "options": ("A", "B")} | more))


def answers(server, asks, **more) -> dict:
    with open_llm(settings(server, **more)) as llm:
        return {answer.key: answer for answer in llm.answer(asks)}


def one(server, the_ask=None, **more):
    (answer,) = answers(server, [the_ask or ask()], **more).values()
    return answer


def in_time(seconds: float, condition) -> bool:
    """Whether a condition comes true within some seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


# What comes back when all is well


def test_every_ask_is_answered_once(server):
    by_key = answers(server, (ask(i) for i in range(300)))
    assert len(by_key) == 300
    assert {answer.fault for answer in by_key.values()} == {None}
    stats = server.stats()
    assert (stats["requests"], stats["duplicates"]) == (300, 0)


@pytest.mark.parametrize("form", ["chat", "text"])
def test_the_verdict_is_soft(server, form):
    prompt = ask().messages if form == "chat" else "question, Yes or No"
    p = p_of(hash_of(json.dumps(prompt, sort_keys=True)))
    options = ("A", "B") if form == "chat" else ("Yes", "No")
    the_ask = Ask("k", **{"messages" if form == "chat" else "text": prompt}, options=options)
    answer = one(server, the_ask)
    first, second = (math.exp(answer.logprobs[option]) for option in options)
    assert first / (first + second) == pytest.approx(p)
    assert answer.texts == (options[0] if p >= 0.5 else options[1],)
    assert answer.finish == "stop"
    assert set(answer.usage) == {"prompt_tokens", "completion_tokens"}


def test_without_logprobs_the_text_is_kept(server):
    assert one(server, logprobs=False).logprobs is None
    server.set_faults({"kind": "no_logprobs"})
    answer = one(server)
    assert (answer.logprobs, answer.fault) == (None, None)
    assert answer.texts[0] in ("A", "B")


def test_several_samples_come_in_one_call(server):
    assert len(one(server, ask(samples=5, temperature=1.0, seed=1)).texts) == 5
    assert server.stats()["requests"] == 1


@pytest.mark.parametrize("text", ["\ud800", "a\x00b", "\u2028\x85\u202e", "\U0001f600", "é\r\n"])
def test_any_character_arrives(server, text):
    messages = [{"role": "user", "content": text}]
    assert one(server, ask(messages=messages)).fault is None
    messages = [{"role": "user", "content": text.replace("\ud800", "\ufffd")}]
    expected = hash_of(json.dumps(messages, sort_keys=True, ensure_ascii=False))
    assert list(server.stats(detail=True)["by_prompt"]) == [expected]


def test_tokens_are_estimated(server):
    with open_llm(settings(server)) as llm:
        tokens, exact = llm.count_tokens(ask(i) for i in range(10))
    assert (tokens, exact) == (10 * (4 + 3), False)  # "question N": 10 bytes, one message


# Faults of one answer: never a label, never an exception, not asked again

ANSWER_FAULTS = {
    "html": "malformed",
    "error": "malformed",
    "nothing": "malformed",
    "array": "malformed",
    "no_choices": "malformed",
    "null_choices": "malformed",
    "list_content": "malformed",
    "nan": "malformed",
    "positive_logprob": "malformed",
    "duplicate_keys": "malformed",
    "big_int": "malformed",
    "deep": "malformed",
    "bad_utf8": "malformed",
    "truncated_json": "malformed",
    "null_content": "empty",
    "empty": "empty",
    "length_empty": "truncated",
    "refusal": "refused",
    "content_filter": "refused",
    "moderated": "refused",
    "content_filter_400": "refused",
    "wrong_model": "wrong_model",
    "400": "rejected",
    "too_long": "too_long",
    "too_long_words": "too_long",
}


@pytest.mark.parametrize(("kind", "fault"), ANSWER_FAULTS.items())
def test_a_bad_answer_is_a_fault_of_its_row_alone(server, kind, fault):
    server.set_faults({"kind": kind, "match": "question 3"})
    by_key = answers(server, [ask(i) for i in range(6)])
    bad = by_key.pop("3")
    assert (bad.fault, bad.texts, bad.logprobs) == (fault, (), None)
    assert bad.detail
    assert "\n" not in bad.detail
    assert len(bad.detail) < 400
    assert [answer.fault for answer in by_key.values()] == [None] * 5
    assert server.stats()["requests"] == 6


@pytest.mark.parametrize(
    ("kind", "text", "finish"),
    [
        ("garbage", "purple monkey dishwasher", "stop"),
        ("length", "Let me think about", "length"),
        ("surrogate", "A \ufffd", "stop"),
    ],
)
def test_a_text_is_handed_on_for_the_judge_to_parse(server, kind, text, finish):
    server.set_faults({"kind": kind})
    answer = one(server)
    assert (answer.texts, answer.finish, answer.logprobs) == ((text,), finish, None)


def test_a_huge_answer_is_an_answer(server):
    server.set_faults({"kind": "huge", "match": "question 1"})
    by_key = answers(server, [ask(i) for i in range(3)])
    assert [len(by_key[key].texts[0]) for key in "012"] == [1, 10_000_000, 1]


def test_another_model_is_fine_where_it_is_not_checked(server):
    server.set_faults({"kind": "wrong_model"})
    assert one(server, check_model=False).fault is None


# Retries


@pytest.mark.parametrize("kind", ["408", "409", "425", "429", "500", "503", "cut", "reset"])
def test_a_passing_failure_is_overcome(server, kind):
    server.set_faults({"kind": kind, "first": 2})
    assert one(server).fault is None
    assert server.stats()["requests"] == 3


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("429", "rate_limited"),
        ("500", "backend"),
        ("503", "backend"),
        ("cut", "backend"),
        ("reset", "backend"),
        ("hang", "timeout"),
        ("drip", "timeout"),
    ],
)
def test_the_attempts_are_bounded_and_not_multiplied(server, kind, fault):
    server.set_faults({"kind": kind})
    with within(4):
        answer = one(server, timeout_s=0.3)
    assert (answer.fault, answer.texts) == (fault, ())
    assert "3 attempts" in answer.detail
    assert server.stats()["requests"] == 3


def test_nobody_there_is_a_backend_fault(server):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        answer = one(server, base_url=url)
    assert answer.fault == "backend"
    assert "onnect" in answer.detail


@pytest.mark.parametrize(
    ("retry_after", "skew", "max_wait_s", "least", "most"),
    [
        ("0", 0, 0.1, 0, 2),
        ("0.4", 0, 5, 0.4, 3),
        ("3600", 0, 0.4, 0.4, 3),
        ("date+1", 864_000, 5, 1, 4),  # the server's clock is ten days fast
        ("date+1", -864_000, 5, 1, 4),
        ("date-60", 0, 0.1, 0, 2),
        ("soon", 0, 0.1, 0, 2),
    ],
)
def test_retry_after_is_kept_to(server, retry_after, skew, max_wait_s, least, most):
    server.set_faults({"kind": "429", "first": 1, "retry_after": retry_after, "skew": skew})
    start = time.monotonic()
    assert one(server, max_wait_s=max_wait_s).fault is None
    assert least <= time.monotonic() - start < most * slowdown()


@pytest.mark.parametrize(
    "fault", [{"kind": "hang"}, {"kind": "drip"}, {"kind": "429", "retry_after": "3600"}]
)
def test_a_slow_row_blocks_nobody(server, fault):
    server.set_faults({"match": "slow", **fault})
    asks = [ask("slow 1"), ask("slow 2"), *map(ask, range(100))]
    with open_llm(settings(server, concurrency=3, timeout_s=1, max_wait_s=1, attempts=2)) as llm:
        order = [answer.key for answer in llm.answer(asks)]
    assert {*order[:100]} == {str(i) for i in range(100)}
    assert {*order[100:]} == {"slow 1", "slow 2"}


def test_a_burst_of_errors_costs_no_row(server):
    server.set_faults({"kind": "503", "p": 0.2}, {"kind": "429", "p": 0.1, "retry_after": "0"})
    by_key = answers(server, map(ask, range(300)), attempts=10, concurrency=32)
    assert {answer.fault for answer in by_key.values()} == {None}
    stats = server.stats()
    assert stats["answered"] == 300
    assert stats["answered_twice"] == 0
    assert stats["requests"] > 350


# What no other request can mend


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("quota", "no quota left"),
        ("402", "no quota left"),
        ("401", "key in OPENAI_API_KEY"),
        ("403", "key in OPENAI_API_KEY"),
        ("404", "no such model or path"),
    ],
)
def test_the_judge_stops_at_once(server, kind, words):
    server.set_faults({"kind": kind})
    with within(4), pytest.raises(JudgeStopped, match=words) as stopped:
        answers(server, map(ask, range(1000)), concurrency=4)
    assert "\n" not in str(stopped.value)
    assert server.stats()["requests"] <= 4


def test_nothing_is_tried_again_after_the_stop(server, monkeypatch):
    monkeypatch.setattr(pool, "GRACE_S", 0.5)
    hang = {"kind": "hang", "match": "question 1"}  # so that the grace is used up
    server.set_faults({"kind": "quota", "match": "question 0"}, hang, {"kind": "500"})
    with pytest.raises(JudgeStopped, match="no quota left"):
        answers(server, map(ask, [1, *range(20, 34), 0]), attempts=100)
    assert server.stats()["requests"] < 60


def test_what_was_paid_for_before_the_stop_is_handed_over(server):
    server.set_faults({"kind": "quota", "match": "question 40"})
    got = []
    with (
        open_llm(settings(server, concurrency=8)) as llm,
        pytest.raises(JudgeStopped, match="no quota left"),
    ):
        got.extend(answer.key for answer in llm.answer(map(ask, range(1000))))
    assert len(got) == len(set(got)) == server.stats()["answered"]
    assert 30 < len(got) < 100


# In flight: as many as allowed, no more, and fewer when the server says so


def test_as_many_are_in_flight_as_allowed():
    with serving(latency_ms=50) as slow:
        answers(slow, map(ask, range(200)), concurrency=40)
        assert slow.stats()["peak_in_flight"] == 40


def test_asks_are_read_as_places_come_free(server):
    server.set_faults({"kind": "hang"})
    pulled = []

    def endless():
        for number in itertools.count():
            pulled.append(number)
            yield ask(number)

    with open_llm(settings(server, concurrency=7, attempts=1, timeout_s=0.5)) as llm:
        stream = llm.answer(endless())
        assert pulled == []
        next(stream)
        # Those of the first batch that timed out have been replaced, and nothing else was read.
        assert 7 < len(pulled) <= 14
        stream.close()


def test_a_server_with_fewer_places_gets_fewer_requests(server):
    with serving(latency_ms=20, faults=[{"kind": "429", "above": 8}]) as narrow:
        by_key = answers(narrow, map(ask, range(600)), concurrency=64, attempts=100)
        assert {answer.fault for answer in by_key.values()} == {None}
        stats = narrow.stats()
    assert stats["answered"] == 600
    assert stats["answered_twice"] == 0
    # It would be some 1,200 were the limit not to follow.
    assert stats["faults"]["429"] < 600


# Ending early


def test_a_closed_generator_leaves_nothing_behind():
    with serving(latency_ms=300) as slow:
        with open_llm(settings(slow, concurrency=20)) as llm:
            stream = llm.answer(map(ask, itertools.count()))
            next(stream)
            assert slow.stats()["in_flight"] > 0
            stream.close()
            assert in_time(2, lambda: slow.stats()["in_flight"] == 0)
            before = slow.stats()["requests"]
            assert len(list(llm.answer(map(ask, range(5))))) == 5  # and it can be used again
            assert slow.stats()["requests"] == before + 5
        llm.close()  # a second time


def test_when_asks_end_those_in_flight_are_answered(server):
    done = threading.Event()

    def until():
        for number in itertools.takewhile(lambda number: not done.is_set(), itertools.count()):
            yield ask(number)

    count = 0
    with open_llm(settings(server, concurrency=8)) as llm:
        for count, _ in enumerate(llm.answer(until()), 1):
            if count == 50:
                done.set()
    assert count == server.stats()["answered"] >= 50


def test_an_error_of_the_asks_comes_after_the_answers(server):
    def failing():
        yield from map(ask, range(30))
        raise InputError("x.jsonl", "line 31", got="nothing", expected="something")

    got = []
    with open_llm(settings(server)) as llm, pytest.raises(InputError, match="line 31"):
        got.extend(llm.answer(failing()))
    assert len(got) == 30


@contextmanager
def alarm_raises(seconds: float):
    """SIGALRM raises Interrupted, once, after some seconds; never within a loop."""

    def ring(number, frame):
        assert asyncio._get_running_loop() is None
        raise Interrupted("enough")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["hang", "busy"])
def test_a_signal_handler_that_raises_is_heard(server, kind):
    server.set_faults(*[{"kind": "hang"}] * (kind == "hang"))
    with (
        within(4),
        open_llm(settings(server, timeout_s=60)) as llm,
        alarm_raises(0.5),
        pytest.raises(Interrupted, match="enough"),
    ):
        list(llm.answer(map(ask, itertools.count())))
    assert in_time(2, lambda: server.stats()["in_flight"] == 0)


def test_a_signal_is_kept_out_of_a_turn_of_the_loop():
    loop, heard = asyncio.new_event_loop(), []
    before = signal.signal(signal.SIGALRM, lambda number, frame: heard.append(number))
    try:
        with Turns(loop) as turns:
            loop.call_soon(signal.raise_signal, signal.SIGALRM)
            turns.run()
            assert heard == []
            turns.deliver()
            assert heard == [signal.SIGALRM]
            signal.raise_signal(signal.SIGALRM)
            assert len(heard) == 2
        signal.raise_signal(signal.SIGALRM)  # the handler is back in its place
        assert len(heard) == 3
    finally:
        signal.signal(signal.SIGALRM, before)
        loop.close()


# Keys and addresses


@pytest.mark.parametrize("kind", ["400", "401", "429", "503", "error"])
def test_a_key_that_the_server_repeats_is_not_shown(server, kind, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.set_faults({"kind": kind, "echo": True})
    try:
        message = one(server).detail
    except JudgeStopped as error:
        message = str(error)
    assert server.stats()["authorizations"] == [f"Bearer {KEY}"]
    assert "Bearer ***" in message
    assert KEY[:8] not in message


def test_a_key_that_is_a_common_word_changes_no_fault(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "choices")
    server.set_faults({"kind": "refusal"})
    assert one(server).fault == "refused"


def test_a_key_cut_short_is_not_shown(server, monkeypatch):
    long_key = "sk-" + "x" * 500
    monkeypatch.setenv("OPENAI_API_KEY", long_key)
    server.set_faults({"kind": "400", "echo": True})
    assert "xxx" not in one(server).detail


def test_a_password_in_the_url_works_and_is_not_shown(server):
    url = server.base_url.replace("http://", "http://me:p%40ss-word@") + "?token=tok-in-query"
    answer = one(server, base_url=url)
    assert answer.fault is None
    assert server.stats()["authorizations"] == ["Basic bWU6cEBzcy13b3Jk"]
    server.set_faults({"kind": "404", "echo": True})
    with pytest.raises(JudgeStopped) as stopped:
        one(server, base_url=url)
    message = str(stopped.value)
    assert server.base_url in message
    assert "Basic ***" in message
    assert not any(secret in message for secret in ("me:", "ss-word", "tok-in", "bWU6"))


def test_no_key_and_no_address_is_one_line(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(InputError, match="MY_KEY: got nothing") as error:
        ApiLLM(LLMSettings(model="openai:m", api_key_env="MY_KEY"), "m")
    assert "\n" not in str(error.value)
    monkeypatch.setenv("MY_KEY", KEY)
    ApiLLM(LLMSettings(model="openai:m", api_key_env="MY_KEY"), "m").close()


BAD_URLS = [
    "localhost:8000/v1",
    "ftp://x/v1",
    "http:///v1",
    "::",
    "http://[::1/v1",
    "http://x:99999",
]


@pytest.mark.parametrize("url", [*BAD_URLS, "me:s3cret@host/v1", "//host/v1?key=s3cret"])
def test_a_bad_address_is_one_line(url):
    with pytest.raises(InputError, match="base_url") as error:
        ApiLLM(LLMSettings(model="openai:m", base_url=url), "m")
    assert "s3cret" not in str(error.value)


def test_a_key_with_odd_characters_is_refused_unseen(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-pl\u00e4nted")
    with pytest.raises(InputError) as error:
        one(server)
    assert "nted" not in str(error.value)
