"""From the log-probabilities of tokens to those of an ask's options.

A server or an engine lists, for each token of a text, the alternatives in its place. Which tokens
count for an option is decided here, the same for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from aif.llm import Ask
from aif.llm.verdict_text import parse_verdict, verdict_in_json

Listed = list[tuple[str, float]]  # tokens and their log-probabilities, nats
Options = dict[str, float]  # each option's log-probability, nats

IMPOSSIBLE = -9999.0  # what OpenAI and vLLM send for a probability of 0
AMBIGUOUS = 0.02  # the most of the options' probability that tokens of two options may have
BARE = " \t\r\n\"'`*_()[]{}:.,"  # may stand in one token with an option
# Enough to read options such as 1 and 10: a blank and two digits, for tokenizers that split them,
# and the token that shows that no digit follows.
SPELLED_TOKENS = 4


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The tokens of a text. `at(i)` has the alternatives of token i, and apart from them token i
    itself if it is not listed."""

    texts: Sequence[str]
    at: Callable[[int], tuple[Listed, Listed]]


def read_texts(
    ask: Ask, texts: Sequence[str], tokens: Sequence[TokenLogprobs]
) -> tuple[Options | None, tuple[Options | None, ...]]:
    """`Answer.logprobs` and `Answer.ends` for these texts and the tokens of each."""
    if not ask.reads_the_end:
        return read_options(ask, texts[0], tokens[0]), ()
    cut = map(ask.cut, texts)
    ends = tuple(read_options(ask, *sample) for sample in zip(cut, tokens, strict=True))
    return None, ends if any(ends) else ()


def read_options(ask: Ask, text: str, tokens: TokenLogprobs) -> Options | None:
    """Each option's log-probability as the verdict of `text`; None if it cannot be read."""
    if ask.reads_the_end:
        read = verdict_in_json if ask.schema else parse_verdict
        verdict = read(text, ask.options)
        start = None if verdict is None else _token_at(text, verdict.at, tokens.texts)
        if start is None:
            return None
        bare = BARE
    else:
        start, bare = 0, None
    if begun(ask.options):
        return _spelled(ask.options, tokens, start, bare)
    return _of_token(ask.options, *tokens.at(start), bare)


def begun(options: Sequence[str]) -> set[str]:
    """Options that begin another, as 1 begins 10: their first token is not enough to read them."""
    return {a for a in options for b in options if a != b and b.startswith(a)}


def _token_at(text: str, at: int, tokens: Sequence[str]) -> int | None:
    """The index of the token that holds character `at` of the text. There may be tokens before and
    after the text (hidden reasons, an end token), and half a character in a token may be escaped.
    """
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
    options: Sequence[str], tokens: Iterable[tuple[str, float]], bare: str | None
) -> dict[str, float]:
    """Each option's probability. Tokens that differ only in case and surrounding spaces (with
    `bare`: in surrounding characters of it) are one option: they add up."""
    option_of = {option.strip().casefold(): option for option in options}
    mass: dict[str, float] = {}
    for token, logprob in tokens:
        option = option_of.get(token.strip(bare).casefold())
        if option is not None:
            mass[option] = mass.get(option, 0.0) + math.exp(logprob)
    return {option: p for option, p in mass.items() if p > 0}


def _of_token(
    options: Sequence[str], listed: Listed, own: Listed, bare: str | None
) -> Options | None:
    """Each option's log-probability as one token; None if none of them is listed.

    An option that is not listed gets an upper bound: no token outside the list is more probable
    than the last one in it, or than 1 minus all of the list.
    """
    tokens = [*listed, *own]
    mass = _mass(options, tokens, bare)
    if not listed or not mass:
        return None
    # Servers round to float32, so the rest is exact to about 1e-6 only.
    left = max(1e-6, 1 - math.fsum(math.exp(logprob) for _, logprob in tokens))
    bound = min(min(logprob for _, logprob in listed), math.log(left))
    return {
        option: min(0.0, math.log(mass[option])) if option in mass else bound for option in options
    }


def _spelled(
    options: Sequence[str], tokens: TokenLogprobs, start: int, bare: str | None
) -> Options | None:
    """The log-probabilities of options of which some begin alike; options not listed are left out.

    If the text has "1", its next token shows whether it goes on to "10". If the text has another
    option and "10" is no token of its own, a small probability of "1" is left out; with a larger
    one the result is None.
    """
    while start < len(tokens.texts) and not tokens.texts[start].strip():
        start += 1
    if start >= len(tokens.texts):
        return None
    mass = _mass(options, chain(*tokens.at(start)), bare)
    for short in begun(options) & mass.keys():
        longer = [option for option in options if option != short and option.startswith(short)]
        if any(option in mass for option in longer):
            continue  # tokens of their own
        whole = mass.pop(short)
        if tokens.texts[start].strip(bare) == short and start + 1 < len(tokens.texts):
            following = list(chain(*tokens.at(start + 1)))
            for option in longer:
                rest = option.removeprefix(short)
                goes_on = (math.exp(lp) for token, lp in following if _goes_on(token, rest, bare))
                mass[option] = whole * min(1.0, math.fsum(goes_on))
            mass[short] = max(0.0, whole - sum(mass[option] for option in longer))
        elif whole > AMBIGUOUS * (whole + sum(mass.values())):
            return None
    return {option: min(0.0, math.log(p)) for option, p in mass.items() if p > 0} or None


def _goes_on(token: str, rest: str, bare: str | None) -> bool:
    """Whether a token is the rest of an option; with a space before it, it is not."""
    return token.rstrip(bare) == rest
