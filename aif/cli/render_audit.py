"""What a person is told of an audit: judges side by side, in a table that fits 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from aif.data.visible import visible

NAME = 18  # columns for a name; a longer one has a line of its own
HEAD = (
    f"{'':{NAME}} {'agree':>5} {'95 %':9} {'kappa':>5} {'same':>5} {'swap':>5} {'pos':>5} "
    f"{'long':>5} {'fault':>5} {'n':>6}"
)
KEY = (
    "agree: with people, where they name a winner; same: of all pairs, the same of win, loss and "
    "tie; swap: the same winner in both orders; pos: more verdicts for the first shown than for "
    "the second; long: how often the longer response wins; fault: calls without a verdict."
)


def audit(summary: Mapping[str, Any]) -> list[str]:
    """How far each judge agrees with people, what it leans to, and what it cost."""
    judges = summary["judges"]
    lines = [*_people(summary), HEAD, *(line for card in judges for line in _card(card))]
    if summary["alpha"] is not None:
        lines.append(f"Krippendorff's alpha across judges {summary['alpha']:.2f}")
    for card in judges:
        lines += ["", _name(card["name"]), *(f"  {line}" for line in _more(card))]
    return [*lines, "", *textwrap.wrap(KEY, 78), f"{summary['run']}/audit.json"]


def _people(summary: Mapping[str, Any]) -> Iterator[str]:
    rows, people, split = (summary[key] for key in ("rows", "people", "split"))
    line = f"{rows:,} pairs, {people:,} with a choice of people"
    yield line + (f", {split:,} on which they are split" if split else "")
    if found := summary["annotators"]:
        share, alpha = _share(found["agreement"]), _figure(found["alpha"])
        yield f"people among themselves: {share} the same, alpha {alpha}"
    if longer := summary["longer_wins"]:
        yield f"the longer response wins {_share(longer)} by people"


def _card(card: Mapping[str, Any]) -> Iterator[str]:
    yield from _row(_name(card["name"]), card)
    for part in ("by_principle", "by_subset"):
        if len(card[part]) > 1:
            for name, found in card[part].items():
                yield from _row(f"  {_name(name)}", found)


def _row(name: str, found: Mapping[str, Any]) -> list[str]:
    agree, position = found["agreement"], found["position"] or {}
    low, high = agree["low"], agree["high"]
    interval = "" if low is None else f"{low:.2f}-{high:.2f}"
    told = (
        f"{_mean(agree):>5} {interval:9} {_figure(found['kappa']):>5} "
        f"{_mean(found['exact']):>5} {_mean(position.get('consistency')):>5} "
        f"{_figure(position.get('bias'), '+'):>5} {_mean(found['longer_wins']['judge']):>5} "
        f"{_figure(found['fault_rate']):>5} {agree['n']:>6,}"
    )
    return [name, f"{'':{NAME}} {told}"] if len(name) > NAME else [f"{name:{NAME}} {told}"]


def _more(card: Mapping[str, Any]) -> Iterator[str]:
    """What a judge's row has no room for."""
    left = [f"{n:,} {kind}" for kind, n in card["null"].items()]
    left += [f"{card['unlabelled']:,} not labelled"] if card["unlabelled"] else []
    left += [f"{card['ties']:,} ties"] if card["ties"] else []
    if left:
        yield f"no winner: {', '.join(left)}"
    if even := card["at_equal_length"]:
        yield f"at equal length it would agree {_share(even)}"
    if own := card["self_preference"]:
        yield (
            f"its own responses win {_share(own['judge'])}, by people {_share(own['people'])} "
            f"({own['judge']['n']:,} pairs)"
        )
    if found := card["calibration"]:
        yield f"calibration error {found['ece']:.3f}"
    if found := card["temperature"]:
        yield (
            f"with temperature {found['temperature']:.2f} it is {found['ece']:.3f} "
            f"on {found['n']:,} others, without it {found['ece_before']:.3f}"
        )
    yield from _cost(card["cost"])
    for kind, found in card.get("canaries", {}).items():
        n, null = found["rate"]["n"], found["null"]
        told = f"{found['flips']:,} of {n:,} flip" if n else "no verdict"
        yield f"canary {kind:9} {told}{f', {null:,} null' if null else ''}"


def _cost(cost: Mapping[str, Any] | None) -> Iterator[str]:
    if cost is None:
        return
    tokens = "".join(f", {n:,} {kind.replace('_', ' ')}" for kind, n in cost["tokens"].items())
    yield f"{cost['calls']:,} calls{tokens}"
    if cost["seconds"]:
        rate = cost["calls_timed"] / cost["seconds"]
        yield f"{cost['seconds']:,.0f} s for {cost['calls_timed']:,} of its calls, {rate:,.1f}/s"


def _name(name: str) -> str:
    return visible(name)


def _mean(estimate: Mapping[str, Any] | None) -> str:
    return _figure(estimate["mean"] if estimate else None)


def _share(estimate: Mapping[str, Any]) -> str:
    low, high = estimate["low"], estimate["high"]
    return _mean(estimate) + ("" if low is None else f" ({low:.2f} to {high:.2f})")


def _figure(value: float | None, sign: str = "") -> str:
    return "-" if value is None else format(value, f"{sign}z.2f")  # z: no -0.00
