"""Reading a verdict from a judge's text, for models without log-probabilities.

A text that does not clearly name one option has no verdict: it never counts as a tie, a no or the
first option. Repeats in the patterns are bounded, so no text takes long to read.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from aif.store import jsonl

_REFUSAL = re.compile(
    r"^\W*(?:i'?m sorry|sorry|i apologi[sz]e|i (?:can(?:no|')t|am unable to|am not able to|won't)"
    r"|as an ai)\b",
    re.IGNORECASE,
)
_ALONE = 80  # characters that a bare option may take with all its decoration
_NEGATED = re.compile(
    r"(?:\b(?:not|neither|nor|whether|if|unless)|n't)(?:\s+\w+)?(?:\s+that)?\s+$", re.IGNORECASE
)
_UNCLEAR = re.compile(
    r"\b(?:not|cannot|neither|nor|or|both|ties?|tied|equal|equally|worse|worst)\b|n't\b",
    re.IGNORECASE,
)
# Words that may follow the option A; before any other word, "A" is the article.
_NO_ARTICLE = (
    r"(?!\s+(?!(?:is|was|has|does|seems|appears|because|since|as|over|by|and|or|for|but|while)\b)"
    r"[a-z])"
)


def parse_choice(text: str, options: tuple[str, str]) -> int | None:
    """Index of the option that `text` chooses, or None.

    These count, in this order: a text that is the option alone; one that starts with the option as
    a whole line or sentence (and is no list of both); the last explicit statement ("B is better",
    "answer: B", "[[B]]"); the only option that the text mentions.
    """
    alone, leading, stated, mentioned, anywhere = _patterns(options)
    text = text.strip().replace("’", "'")
    if len(text) <= _ALONE and (match := alone.fullmatch(text)):
        return _index(match, options)
    if leading.match(text) and len(leads := _named(leading, text, options)) == 1:
        return leads.pop()
    statements = [
        match
        for match in stated.finditer(text)
        if not _NEGATED.search(text, max(0, match.start() - 40), match.start())
    ]
    if statements:
        return _index(statements[-1], options)
    if _UNCLEAR.search(text) or len(_named(anywhere, text, options)) != 1:
        return None
    named = _named(mentioned, text, options)
    return named.pop() if named else None


class Stated(NamedTuple):
    """A verdict in a text: the index of the option, and of its first character in the text."""

    option: int
    at: int


def parse_verdict(text: str, options: tuple[str, ...]) -> Stated | None:
    """The verdict at the end of a text with reasons, on a line of its own: "Verdict: A".

    A text that is the option alone is a verdict too. A text that goes on after its verdict has
    none, and a verdict quoted inside the last line does not count.
    """
    text = text.rstrip()
    alone, ending = _endings(options)
    match = alone.fullmatch(text) if len(text) <= _ALONE else None
    match = match or ending.search(text, max(0, len(text) - _TAIL))
    return Stated(_index(match, options), match.start(1)) if match else None


def verdict_in_json(text: str, options: tuple[str, ...]) -> Stated | None:
    """The verdict of a structured answer, {"verdict": "A"}, whatever else the object holds."""
    try:
        reply = jsonl.loads(text)
    except ValueError:
        return None
    verdict = reply.get("verdict") if isinstance(reply, dict) else None
    if not isinstance(verdict, str) or verdict not in options:
        return None
    return Stated(options.index(verdict), text.rfind(f'"{verdict}"') + 1)


def parse_rating(text: str, lowest: int, highest: int) -> float | None:
    """The rating in `text`, or None: the number alone, the last one that the text calls a rating
    ("Rating: 8", "8/10", "[[8]]"), or the only number."""
    alone, stated, scale = _ratings(lowest, highest)
    text = scale.sub(" ", text.strip())
    match = alone.fullmatch(text) if len(text) <= _ALONE else None
    matches = [match] if match else list(stated.finditer(text))
    if not matches:
        numbers = _WITH_DIGITS.findall(text)
        only = re.fullmatch(_NUMBER, numbers[0].rstrip(".,")) if len(numbers) == 1 else None
        matches = [only] if only else []
    if not matches:
        return None
    rating = float(matches[-1][matches[-1].lastindex or 0])
    return rating if lowest <= rating <= highest else None


def is_refusal(text: str) -> bool:
    """Whether the text begins as a model's refusal does."""
    return bool(_REFUSAL.match(text.replace("’", "'")))


_TAIL = 200  # the most characters of the line with the verdict
_WITH_DIGITS = re.compile(r"[\w.,/%-]*\d[\w.,/%-]*")
_NUMBER = r"(\d{1,3}(?:\.\d{1,2})?)"


@lru_cache
def _endings(options: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns for a text that is an option alone, and for a verdict at the end of a text."""
    one = "|".join(re.escape(option) for option in options)
    noun = r"(?:(?:output|response|answer|option|assistant|summary|text)\W{1,3})?"
    return (
        re.compile(rf"\W{{0,8}}{noun}({one})\W{{0,8}}", re.IGNORECASE),
        re.compile(
            r"(?:^|\n)\W{0,8}(?:(?:the|my|final|overall|so|thus|therefore)\W{1,3}){0,3}verdict\W{0,8}"
            rf"(?:is\W{{1,6}})?{noun}({one})\W{{0,8}}\Z",
            re.IGNORECASE,
        ),
    )


@lru_cache
def _ratings(lowest: int, highest: int) -> tuple[re.Pattern[str], ...]:
    """Patterns for a text that is a rating alone, for a number called a rating, for the scale."""
    word = r"(?:rating|score|grade|verdict)"
    of = rf"(?:\s{{0,2}}/\s{{0,2}}{highest}(?!\d)|\s{{1,3}}out\s{{1,3}}of\s{{1,3}}{highest}(?!\d))"
    ends = r"(?![\w%]|[.,/]\d|\s{0,2}[-\u2013/]\s{0,2}\d)"
    begins = r"(?<![\w.,/-])"
    return (
        re.compile(rf"[^\w-]{{0,8}}(?:{word}[^\w-]{{0,6}})?{_NUMBER}(?:{of})?\W{{0,8}}", re.I),
        re.compile(
            rf"\b{word}\b(?:\s{{1,3}}(?:is|of|would\s{{1,3}}be))?[^\w-]{{0,6}}{_NUMBER}(?:{of}|{ends})"
            rf"|{begins}{_NUMBER}{of}|\[\[\s{{0,3}}{_NUMBER}\s{{0,3}}\]\]",
            re.I,
        ),
        re.compile(rf"\b{lowest}\s{{0,3}}(?:to|-|\u2013|through|and)\s{{0,3}}{highest}\b"),
    )


@lru_cache
def _patterns(options: tuple[str, str]) -> tuple[re.Pattern[str], ...]:
    # An option may be quoted, bracketed, bold, or after a noun: **B**, (b), [[B]], Output (b)
    one = "|".join(re.escape(option) for option in sorted(options, key=len, reverse=True))
    opening, closing = r"[\"'`*(\[]{0,4}", r"[\"'`*)\]]{0,4}"
    noun = r"(?:\b(?:output|response|answer|option|assistant|summary|text)\s{0,4})?"
    ends = r"(?=\s{0,4}(?:[.,:;!](?!\w)|\n|$|\s-\s))"
    if all(len(option) == 1 for option in options):
        # A lone lower-case "a" in running text is an article: marked, or in upper case.
        upper = "|".join(re.escape(option.upper()) for option in options)
        token = (
            rf"(?:[\"'`*(\[]{{1,4}}({one})[\"'`*)\]]{{1,4}}"
            rf"|(?<![\w'])((?-i:{upper}))(?![\w']|[.-]\w)(?-i:{_NO_ARTICLE}))"
        )
        mentioned = anywhere = token
    else:  # "yes" and "no" are words, too: a mention counts where a clause ends with it
        token = rf"{opening}\b({one})\b{closing}"
        mentioned, anywhere = rf"\b({one})\b{closing}{ends}", rf"\b({one})\b"
    verbs = (
        r"(?:is|was|seems|appears(?:\s+to\s+be)?)\s{1,4}"
        r"(?:(?:the|clearly|slightly|much)\s{1,4}){0,4}"
    )
    stated = (
        rf"{noun}{token}\s{{1,4}}{verbs}"
        r"(?:better|best|preferred|preferable|superior|winner|correct)\b"
        r"|\b(?:answer|verdict|winner|choice|decision|choose|prefer|select)\b(?:\s{1,4}is)?"
        rf"\s{{0,4}}[:=]?\s{{0,4}}{opening}{noun}{token}"
        rf"|\[\[\s{{0,4}}({one})\s{{0,4}}\]\]"
    )
    patterns = (
        rf"\W*{noun}{opening}\b({one})\b\W*",
        rf"(?:^|[.,;:!/\n]\s{{0,4}}){opening}\b({one})\b{closing}{ends}",
        stated,
        mentioned,
        anywhere,
    )
    return tuple(re.compile(pattern, re.IGNORECASE) for pattern in patterns)


def _named(pattern: re.Pattern[str], text: str, options: tuple[str, str]) -> set[int]:
    return {_index(match, options) for match in pattern.finditer(text)}


def _index(match: re.Match[str], options: tuple[str, str]) -> int:
    name = match[match.lastindex or 0].casefold()
    return [option.casefold() for option in options].index(name)
