"""Reading a verdict from a judge's text, where log-probabilities are not to be had.

A text that does not clearly name one option has no verdict: it is never taken for a tie, a no or
the first option. Repeats in the patterns are bounded, so that no text takes long to read.
"""

from __future__ import annotations

import re
from functools import lru_cache

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
# Words that may follow the option A; before any other, "A" is taken for the article.
_NO_ARTICLE = (
    r"(?!\s+(?!(?:is|was|has|does|seems|appears|because|since|as|over|by|and|or|for|but|while)\b)"
    r"[a-z])"
)


def parse_choice(text: str, options: tuple[str, str]) -> int | None:
    """Index of the option that `text` chooses, or None.

    In this order: the text is the option alone; it starts with the option as a whole line or
    sentence (and is no list of both); the last explicit statement ("B is better", "answer: B",
    "[[B]]"); the only option that the text mentions at all.
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


def is_refusal(text: str) -> bool:
    """Whether the text opens the way a model declines."""
    return bool(_REFUSAL.match(text.replace("’", "'")))


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
    found = (
        rf"\W*{noun}{opening}\b({one})\b\W*",
        rf"(?:^|[.,;:!/\n]\s{{0,4}}){opening}\b({one})\b{closing}{ends}",
        stated,
        mentioned,
        anywhere,
    )
    return tuple(re.compile(pattern, re.IGNORECASE) for pattern in found)


def _named(pattern: re.Pattern[str], text: str, options: tuple[str, str]) -> set[int]:
    return {_index(match, options) for match in pattern.finditer(text)}


def _index(match: re.Match[str], options: tuple[str, str]) -> int:
    said = match[match.lastindex or 0].casefold()
    return [option.casefold() for option in options].index(said)
