"""Errors that a person can act on: one line that names file, key, got and expected."""

from __future__ import annotations


class AifError(Exception):
    """An error in one line. The command line prints it and exits with `exit_code`."""

    exit_code = 1


class InputError(AifError):
    """A file or setting is not what it should be.

    >>> str(InputError("x.toml", "label.seed", got="'a'", expected="a whole number"))
    "x.toml: label.seed: got 'a', expected a whole number"
    """

    def __init__(self, where: object, key: str, *, got: str, expected: str):
        place = f"{where}: {key}" if key else str(where)
        super().__init__(f"{place}: got {got}, expected {expected}")


class RunBusy(AifError):
    """Another process is writing to this run folder."""


class JudgeStopped(AifError):
    """The model behind a stage cannot go on (bad key, no quota, gone); the run is resumable."""


class Interrupted(AifError):
    """Stopped by a signal; everything durable is kept and the same command resumes."""

    exit_code = 130


class BudgetSpent(AifError):
    """The next call may cost more than is left; what was paid for is kept, the run is resumable."""

    exit_code = 4


class TooSlow(AifError):
    """The run is expected to take longer than `--within` allows; nothing was done."""

    exit_code = 5


class TooManyFaults(AifError):
    """The stage is complete, but more of its calls failed than `--max-fault-rate` allows."""

    exit_code = 3


def shown(value: object, limit: int = 60) -> str:
    """A value as an error message shows it: its repr, cut at `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
