"""How many requests may be in flight, and how long a refusal makes us wait."""

from __future__ import annotations

import asyncio
import random
from email.utils import formatdate

import pytest

from aif.llm import rate_limit
from aif.llm.rate_limit import InFlight, retry_after_s, wait_s

NOW = 1_700_000_000.0
TEN_DAYS = 864_000.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0),
        ("1.5", 1.5),
        (" 20 ", 20),
        ("3600", 3600),
        ("-5", 0),
        ("nan", 0),
        ("inf", float("inf")),
        ("soon", 0),
        ("", 0),
        ("Wed, 99 Foo 2024 99:99:99 GMT", 0),
    ],
)
def test_retry_after_in_seconds(value, seconds):
    assert retry_after_s({"retry-after": value}) == seconds


def test_without_retry_after_nothing_is_asked():
    assert retry_after_s({}) == 0


@pytest.mark.parametrize("skew", [-TEN_DAYS, 0, TEN_DAYS])
def test_a_date_is_read_against_the_servers_own_clock(skew, monkeypatch):
    monkeypatch.setattr(rate_limit.time, "time", lambda: NOW + skew)
    headers = {
        "retry-after": formatdate(NOW + 30, usegmt=True),
        "date": formatdate(NOW, usegmt=True),
    }
    assert retry_after_s(headers) == 30


@pytest.mark.parametrize(("skew", "seconds"), [(0, 30), (TEN_DAYS, 0), (-TEN_DAYS, TEN_DAYS + 30)])
def test_a_date_without_the_servers_clock_is_never_negative(skew, seconds, monkeypatch):
    monkeypatch.setattr(rate_limit.time, "time", lambda: NOW + skew)
    assert retry_after_s({"retry-after": formatdate(NOW + 30, usegmt=True)}) == seconds


@pytest.mark.parametrize("value", ["3600", "inf", formatdate(4e9, usegmt=True), "0", "-9", "x"])
@pytest.mark.parametrize("failures", [1, 5, 5000])
def test_a_wait_is_bounded(value, failures):
    assert 0 <= wait_s({"retry-after": value}, failures, 7.0) <= 7.0


def test_backoff_doubles_and_is_jittered(monkeypatch):
    tops = []
    monkeypatch.setattr(
        rate_limit.random, "uniform", lambda low, top: tops.append((low, top)) or top
    )
    waits = [wait_s({}, failures, 60.0) for failures in (1, 2, 3, 4)]
    assert waits == [0.5, 1.0, 2.0, 4.0]
    assert tops == [(0, wait) for wait in waits]


def rounds(limit: InFlight, admits, count: int) -> None:
    """Play rounds of `limit.limit` outcomes; `admits(i)` says whether the i-th is let in."""
    for _ in range(count):
        for i in range(limit.limit):
            limit.count(refused=not admits(i))


def test_the_limit_is_at_most_halved_once_a_round():
    limit = InFlight(64)
    for _ in range(63):
        limit.count(refused=True)
    assert limit.limit == 64
    limit.count(refused=True)
    assert limit.limit == 32


def test_the_limit_never_falls_below_one():
    limit = InFlight(64)
    rounds(limit, lambda i: False, 20)
    assert limit.limit == 1


def test_the_limit_recovers_additively_and_stops_at_the_ceiling():
    limit = InFlight(64)
    rounds(limit, lambda i: False, 20)
    seen = []
    for _ in range(40):
        seen.append(limit.limit)
        rounds(limit, lambda i: True, 1)
    assert seen[:4] == [1, 3, 5, 7]
    assert limit.limit == 64


def test_the_limit_finds_what_the_server_admits():
    limit = InFlight(256)
    rounds(limit, lambda i: i < 40, 8)
    assert 40 <= limit.limit <= 48


def test_a_few_random_refusals_cost_little():
    chance = random.Random(0)
    limit = InFlight(256)
    rounds(limit, lambda i: chance.random() > 0.02, 100)
    assert limit.limit > 200


def test_those_who_come_again_go_first_and_none_enters_after_shut():
    async def play() -> list[str]:
        limit, order = InFlight(1), []

        async def visit(name: str, again: bool) -> None:
            await limit.enter(again=again)
            order.append(name)

        await limit.enter()
        visitors = [asyncio.create_task(visit(name, name == "again")) for name in ("new", "again")]
        await asyncio.sleep(0)
        limit.leave()
        await asyncio.sleep(0.01)
        limit.shut()
        limit.leave()
        await asyncio.sleep(0.01)
        for visitor in visitors:
            visitor.cancel()
        return order

    assert asyncio.run(play()) == ["again"]
