"""From the log-probabilities of tokens to those of an ask's options.

A server or an engine tells, for each token of a text, which others might have stood there. Which
of these positions speak for an option is the same question whoever told them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aif.llm import Ask
from aif.llm.verdict_text import Stated, parse_verdict, verdict_in_json

Listed = list[tuple[str, float]]  # tokens and their log-probabilities, nats

IMPOSSIBLE = -9999.0  # what OpenAI and vLLM send for a probability of 0
UNTOLD = 0.02  # of the options' probability may be of tokens that begin two of them
BARE = " \t\r\n\"'`*_()[]{}:.,"  # what may be in one token with an option in a text


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a text. `at(i)` has the alternatives for token i, and that token with its
    own log-probability where it is not among them."""

    texts: Sequence[str]
    at: Callable[[int], tuple[Listed, Listed]]


def read_options(ask: Ask, text: str, tokens: Tokens) -> dict[str, float] | None:
    """Each option's log-probability as the verdict of `text`; None where it is not to be had."""
    if ask.reads_the_end:
        found = verdict_of(ask, text)
        start = None if found is None else _token_at(text, found.at, tokens.texts)
        if start is None:
            return None
        bare = BARE
    else:
        start, bare = 0, None
    if begun(ask.options):
        return _spelled(ask.options, tokens, start, bare)
    return _of_token(ask.options, *tokens.at(start), bare)


def verdict_of(ask: Ask, text: str) -> Stated | None:
    """The verdict that a text comes to at its end, as the ask wants it told."""
    return (verdict_in_json if ask.schema else parse_verdict)(text, ask.options)


def begun(options: Sequence[str]) -> set[str]:
    """Options that others begin with, as 10 does with 1: one token does not tell them apart."""
    return {a for a in options for b in options if a != b and b.startswith(a)}


def _token_at(text: str, at: int, tokens: Sequence[str]) -> int | None:
    """The token that holds character `at` of the text. Tokens may go on before and behind it (a
    model's hidden reasons, an end token), and a character cut in two may not be spelled in them."""
    joined = "".join(tokens)
    begins = joined.rfind(text)
    place = begins + at if begins >= 0 else joined.rfind(text[at:])
    if place < 0:
        return None
    for i, token in enumerate(tokens):
        place -= len(token)
        if place < 0:
            return i
    return None


def _mass(
    options: Sequence[str], tokens: Sequence[tuple[str, float]], bare: str | None
) -> dict[str, float]:
    """Each option's probability. Tokens that differ in case and surrounding spaces only (and with
    `bare` in those characters) are one option: they add up."""
    wanted = {option.strip().casefold(): option for option in options}
    mass: dict[str, float] = {}
    for token, logprob in tokens:
        option = wanted.get(token.strip(bare).casefold())
        if option is not None:
            mass[option] = mass.get(option, 0.0) + math.exp(logprob)
    return {option: p for option, p in mass.items() if p > 0}


def _of_token(
    options: Sequence[str], listed: Listed, own: Listed, bare: str | None
) -> dict[str, float] | None:
    """Each option's log-probability as one token; None where none of them is listed.

    An option that is not listed gets an upper bound: no token outside the list is likelier than
    the last one in it, nor than all that the list leaves over.
    """
    mass = _mass(options, [*listed, *own], bare)
    if not listed or not mass:
        return None
    # Float32 servers round: what is left over is known to about 1e-6 only.
    left = max(1e-6, 1 - math.fsum(math.exp(logprob) for _, logprob in [*listed, *own]))
    bound = min(min(logprob for _, logprob in listed), math.log(left))
    return {
        option: min(0.0, math.log(mass[option])) if option in mass else bound for option in options
    }


def _spelled(
    options: Sequence[str], tokens: Tokens, start: int, bare: str | None
) -> dict[str, float] | None:
    """The log-probabilities of options some of which begin alike; those not listed are left out.

    Whether "1" is all or goes on to "10" is told by the token behind it, where the text went that
    way. Where it did not, and "10" is no token of its own, a small probability of "1" is left out;
    a larger one leaves nothing to be read.
    """
    while start < len(tokens.texts) and not tokens.texts[start].strip():
        start += 1
    if start >= len(tokens.texts):
        return None
    mass = _mass(options, [pair for some in tokens.at(start) for pair in some], bare)
    for short in begun(options) & mass.keys():
        longer = [option for option in options if option != short and option.startswith(short)]
        if any(option in mass for option in longer):
            continue  # tokens of their own
        whole = mass.pop(short)
        if tokens.texts[start].strip(bare) == short and start + 1 < len(tokens.texts):
            behind = [pair for some in tokens.at(start + 1) for pair in some]
            rests = {option: option.removeprefix(short) for option in longer}
            for option, rest in rests.items():
                goes_on = (math.exp(lp) for token, lp in behind if _goes_on(token, rest, bare))
                mass[option] = whole * min(1.0, math.fsum(goes_on))
            mass[short] = max(0.0, whole - sum(mass[option] for option in longer))
        elif whole > UNTOLD * (whole + sum(mass.values())):
            return None
    return {option: min(0.0, math.log(p)) for option, p in mass.items() if p > 0} or None


def _goes_on(token: str, rest: str, bare: str | None) -> bool:
    """Whether a token is the rest of an option: a space before it would end the option."""
    return token.rstrip(bare) == rest
