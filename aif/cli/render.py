"""What the verbs share when they print: counts, numbers, and rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def counts(of: Mapping[str, int]) -> str:
    """
    >>> counts({"refused": 1200, "unparsed": 3})
    '1,200 refused, 3 unparsed'
    """
    return ", ".join(f"{n:,} {kind}" for kind, n in of.items())


def tokens(usage: Mapping[str, int]) -> dict[str, int]:
    """
    >>> counts(tokens({"prompt_tokens": 12}))
    '12 prompt tokens'
    """
    return {kind.replace("_", " "): n for kind, n in usage.items()}


def number(value: float | None, form: str = "z.2f") -> str:
    """A number, or "-" where there is none. The z writes -0.00 as 0.00."""
    return "-" if value is None else format(value, form)


def mean(estimate: Mapping[str, Any] | None, form: str = "z.2f") -> str:
    """The mean of an estimate."""
    return number(estimate["mean"] if estimate else None, form)


def interval(estimate: Mapping[str, Any] | None) -> str:
    """The interval of an estimate for a table; empty where there is none."""
    if not estimate or estimate["low"] is None:
        return ""
    return f"{estimate['low']:.2f}-{estimate['high']:.2f}"


def table_row(name: str, cells: str, width: int) -> list[str]:
    """A row of a table. A name that is wider than its column has a line of its own."""
    return [name, f"{'':{width}} {cells}"] if len(name) > width else [f"{name:{width}} {cells}"]
