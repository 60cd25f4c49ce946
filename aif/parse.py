"""Reading a verdict from a judge's text, where log-probabilities are not to be had.

A text that does not clearly name one option has no verdict: it is never taken for a tie, a no or
the first option.
"""

from __future__ import annotations

import re
from functools import lru_cache

_REFUSAL = re.compile(
    r"^\W*(?:i'?m sorry|sorry|i apologi[sz]e|i (?:can(?:no|')t|am unable to|am not able to|won't)"
    r"|as an ai)\b",
    re.IGNORECASE,
)


def parse_choice(text: str, options: tuple[str, str]) -> int | None:
    """Index of the option that `text` chooses, or None.

    In this order: the text is the option alone; it starts with the option as a whole line or
    sentence; the last explicit statement ("B is better", "answer: B", "[[B]]"); the only option
    that the text mentions at all.
    """
    alone, leading, stated, mentioned = _patterns(options)
    text = text.strip().replace("’", "'")
    for pattern in (alone, leading):
        if match := pattern.match(text):
            return _index(match[1], options)
    if statements := list(stated.finditer(text)):
        last = statements[-1]
        return _index(last[last.lastindex], options)
    named = {_index(match[match.lastindex], options) for match in mentioned.finditer(text)}
    return named.pop() if len(named) == 1 else None


def is_refusal(text: str) -> bool:
    """Whether the text opens the way a model declines."""
    return bool(_REFUSAL.match(text.replace("’", "'")))


@lru_cache
def _patterns(options: tuple[str, str]) -> tuple[re.Pattern[str], ...]:
    # An option may be quoted, bracketed, bold, or after a noun: **B**, (b), [[B]], Output (b)
    one = "|".join(re.escape(option) for option in sorted(options, key=len, reverse=True))
    noun = r"(?:(?:output|response|answer|option|assistant|summary|text)\s*)?"
    token = rf"{noun}[\"'`*(\[]*\b({one})\b[\"'`*)\]]*"
    verbs = r"(?:is|was|seems|appears(?: to be)?)\s+(?:the\s+|clearly\s+|slightly\s+|much\s+)*"
    stated = (
        rf"{token}\s+{verbs}(?:better|best|preferred|preferable|superior|winner|correct)\b"
        rf"|(?:answer|verdict|winner|choice|decision|choose|prefer|select)\b(?:\s+is)?\s*[:=]?\s*"
        rf"[\"'`*(\[]*{token}"
        rf"|\[\[\s*({one})\s*\]\]"
    )
    flags = re.IGNORECASE
    # A lone lower-case "a" in running text is an article: mentions count in brackets or upper case.
    single = all(len(option) == 1 for option in options)
    upper = "|".join(re.escape(option.upper()) for option in options)
    loose = rf"[(\[]((?i:{one}))[)\]]|(?<![\w'])({upper})(?![\w'])" if single else None
    mentioned = re.compile(loose) if loose else re.compile(rf"\b({one})\b", flags)
    return (
        re.compile(rf"\W*{token}\W*$", flags),
        re.compile(rf"[\"'`*(\[]*\b({one})\b[\"'`*)\]]*\s*(?:[.,:;!\n-]|$)", flags),
        re.compile(stated, flags),
        mentioned,
    )


def _index(option: str, options: tuple[str, str]) -> int:
    return [o.casefold() for o in options].index(option.casefold())
