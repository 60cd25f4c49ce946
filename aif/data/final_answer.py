r"""Reading the final answer from a text that reasons its way to one.

    >>> final_answer(r"9 * 2 = 18, so she makes 18 dollars. The answer is **$18.00**.")
    '18'

It is the text's last statement of an answer: "the answer is X", "Answer: X", GSM8K's "#### X",
\boxed{X}, "(B) is correct", or else its last line where that is a number or an option alone. A text
that states none has none. Repeats in the patterns are bounded, so that no text takes long to read.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator

from aif.signals import handling

TAIL = 20_000  # characters from the end in which an answer is looked for
PHRASE = 100  # characters that a statement may take; what is longer is an explanation
PATTERN_S = 5.0  # for one text; a regex that needs more would not end at all

_MARKER = re.compile(  # "the answer to the question is", "**Answer:**", "## Final Answer"
    r"""
    (?<![a-z])(?:answers?|ans|(?:correct|right|best|final|my)\s{1,4}(?:option|choice|letter))
        (?![a-z])[*_]{0,3}
        (?:\s{1,4}(?:to|for|of|we|i)\b[^\n.:]{1,80}?)?
        (?:\s{1,4}(?:is|are|was|(?:would|should|must|will|has\sto)\s{1,4}be|comes\s{1,4}to)\b
          |\s{0,4}[:=])
    |^[\s#*_]{1,8}(?:(?:the|final|correct)\s{1,4}){0,2}answer[\s*_]{0,8}$
    |<answer>
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_LEAD = re.compile(r"(?:[\s:=*_`\"'“$]|\\\[|\\\()*")
_GSM8K = re.compile(r"^[ \t]*####[ \t]*([^\s#][^\n]*)", re.MULTILINE)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s{0,4}\{")
_FIGURE = r"[-+−]?[$£€]?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
_REVERSED = re.compile(  # "(B) is correct", "option B is the best choice", "18 is the answer"
    r"(?<![\w.,-])\(?([A-J])\)?[*_]{0,3}\s{1,4}is\s{1,4}"
    r"(?:the\s{1,4})?(?:correct|right|(?:best\s{1,4})?(?:answer|option|choice))\b"
    rf"|(?<![\w.,-])({_FIGURE})[*_]{{0,3}}\s{{1,4}}is\s{{1,4}}the\s{{1,4}}"
    r"(?:(?:correct|right|final)\s{1,4})?answer\b"
)
_DENIED = re.compile(
    r"(?:\b(?:not|whether|if|unless|suppose)|n['’]t)(?:\s+[\w'’]+){0,4}\s+$", re.IGNORECASE
)
_NOTHING = re.compile(  # what may follow "the answer is" without being one
    r"\W*(?:not|let|let['’]s|to\s+(?:find|solve|determine|get)|we|first|as\s+follows|below"
    r"|(?:in)?correct|wrong|reasonable|obtained|found|derived|based)\b",
    re.IGNORECASE,
)
_CLAUSE = re.compile(  # where a statement ends or goes on to something else
    r"(?<!\b[A-Z])(?<!\b(?:St|Dr|Mr|Ms|Mt|Jr|Sr))(?<!\bMrs)[.!?](?=[\s*\"'”)]|$)"
    r"|;|\s[–—]\s|\s-\s+(?=[a-z])|,?\s+(?:because|since|as|so|but)\b"
    r"|,\s+which\b|</answer>"
)
_ALONE = re.compile(
    rf"[\s*_`$(\[]*(?:(?-i:[A-J])|{_FIGURE}(?:/[0-9]+)?|yes|no|true|false)[\s*_`$%)\].]*",
    re.IGNORECASE,
)
_OPTION = re.compile(r"\(([A-J])\)")
_NOT = re.compile(r"\b(?:not|nor|neither|wrong|incorrect)\b|n['’]t\b", re.IGNORECASE)


def final_answer(text: str, pattern: re.Pattern[str] | None = None) -> str | None:
    """The answer that `text` ends in, normalised, or None; the last one stated counts.

    With a `pattern` it is what the group of its last match holds. Raises TimeoutError if that
    takes long (in the main thread; elsewhere nothing can stop a match).
    """
    text = text.rstrip()[-TAIL:]
    if pattern is not None:
        with handling({signal.SIGALRM: _too_late}, alarm_s=PATTERN_S):
            statements = [match[1] for match in pattern.finditer(text) if match[1]]
        return _last_of(statements)
    stated = [raw for _, raw in sorted(_statements(text), key=lambda at: at[0])]
    return _last_of(stated) or _last_of(list(_bare(text)))


def _last_of(statements: list[str]) -> str | None:
    answers = (normalise(raw) for raw in reversed(statements))
    return next((answer for answer in answers if answer is not None), None)


def _too_late(number: int, frame: object) -> None:
    raise TimeoutError  # it ends the match, which looks for signals as it goes


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """(place, answer) of everything that is stated as one."""

    def denied(match: re.Match[str]) -> bool:
        return bool(_DENIED.search(text, max(0, match.start() - 40), match.start()))

    for match in _MARKER.finditer(text):
        start = _LEAD.match(text, match.end()).end()
        line = text[start : start + 3 * PHRASE].partition("\n")[0]
        statement = _CLAUSE.split(line, maxsplit=1)[0]
        if len(statement) <= PHRASE and not _NOTHING.match(statement) and not denied(match):
            yield match.start(), statement
    for match in _GSM8K.finditer(text):
        # "#### Step 2" is a Markdown heading; a number alone, or the end of the text, is none.
        if _ALONE.fullmatch(match[1]) or match.end() == len(text):
            yield match.start(), match[1]
    for match in _BOXED.finditer(text):
        end = _closing(text, match.end())
        if end is not None:
            yield match.end(), text[match.end() : end]
    for match in _REVERSED.finditer(text):
        if not denied(match):
            yield match.start(), match[match.lastindex]


_BRACE = re.compile(r"[{}]")


def _closing(text: str, start: int) -> int | None:
    """Where the brace that was opened before `start` is closed."""
    depth = 1
    for match in _BRACE.finditer(text, start, start + 3 * PHRASE):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    return None


def _bare(text: str) -> Iterator[str]:
    """The last line where it is an answer alone, or the one option that the last sentence names."""
    last = text.rpartition("\n")[2]
    if _ALONE.fullmatch(last):
        yield last
        return
    sentence = re.split(r"(?<=[.!?])\s", last)[-1]
    named = set(_OPTION.findall(sentence))
    listed = sentence.lstrip().startswith("(") and len(set(_OPTION.findall(text))) > 1
    if len(named) == 1 and not listed and not _NOT.search(sentence):
        yield named.pop()


_CLEAN = [  # pattern, and what takes its place; in this order
    (re.compile(pattern), to)
    for pattern, to in (
        (r"[−‐-–]", "-"),
        (r"’", "'"),
        (r"\\(?:left|right|displaystyle)\b|\\[,;:! ()\[\]]|\^?\{?\\circ\}?|°", ""),
        (r"\{,\}", ","),
        (r"[$£€¥₹`]|\\(?=[$%])|\*\*|__", ""),
        (r"\\(?:boxed|fbox|text\w*|math\w*|mbox)\s*\{([^{}]*)\}", r"\1"),
        (r"\\[dt]frac", r"\\frac"),
        (r"([0-9])\s*\\frac", r"\1 \\frac"),  # a mixed number
        (r"\\frac\s*(?:\{(-?\w+)\}\s*\{(\w+)\}|([0-9])([0-9]))", r"\1\3/\2\4"),
        (r"\s+", " "),
        (r" ?([-+*/=<>^]) ?", r"\1"),
    )
]
_HEDGE = re.compile(
    r"(?:(?:therefore|thus|hence|simply|just|indeed|actually|approximately|approx\.?|about|around"
    r"|roughly|equal to|given by|option|choice|letter)\b[,:]?|[≈~=:,])\s*(?=\S)"
)
_LETTER = re.compile(
    r"\(([a-z])\)(?:[:.,]?\s.*)?|([a-j])(?:[.):]+(?:\s+|(?=-))(?![a-z]\.).+)?", re.DOTALL
)
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_UNIT = r"(?:a|[a-z]{2,})(?:[²³]|\^[23])?"  # one letter behind a number may be a variable
_QUANTITY = re.compile(
    r"([-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))(?: ?%)?"
    rf"(?: ({_UNIT}(?:(?:[/-]|\.? ){_UNIT}){{0,7}}))?"
)
# "5 million" is not 5, nor is "2 pi" 2, nor "9 pm" what "9 am" is.
_NO_UNIT = re.compile(
    r"\b(?:and|or|to|by|plus|minus|am|pm|bce?|ad|pi|dozen|hundred|thousand|[mb]illion|trillion"
    r"|squared|cubed|half)\b"
)


def normalise(raw: str) -> str | None:
    r"""An answer as it is compared with others, or None where nothing is left of it.

    Case, surrounding punctuation, quotes, Markdown, LaTeX's wrappers, "$", thousands commas,
    "about" and a leading article go; 3.0 is 3; of "x = 3" and "1 + 2 = 3" the right side stays;
    "(B) 42" is the option b. A unit or percent sign behind a number goes: 50% is 50, and 18 eggs
    are 18. Nothing is computed: 1/2 stays 1/2.
    """
    if len(raw) > 10 * PHRASE:
        return None
    text = raw.casefold()
    for pattern, to in _CLEAN:
        text = pattern.sub(to, text)
    text = _stripped(text)
    while match := _HEDGE.match(text):
        text = text[match.end() :]
    option = _LETTER.fullmatch(text)
    if option and len(re.findall(r"\([a-z]\)", text)) <= 1:
        return option[1] or option[2]
    if not text.startswith(("(", "[", "{")):  # there a comma stands between coordinates
        text = _THOUSANDS.sub("", text)
    if "=" in text and not re.search(r"[,<>!]| and | or ", text):
        text = text.rpartition("=")[2] or text
    quantity = _QUANTITY.fullmatch(text)
    if quantity and not _NO_UNIT.search(quantity[2] or ""):
        return _plain_number(quantity[1])
    if match := re.match(r"(yes|no|true|false)[.,;:]", text):
        return match[1]
    text = re.sub(r"^(?:the|an?) (?!or |and )", "", text)
    return re.sub(r", (?=[-0-9(])", ",", text) or None


def _stripped(text: str) -> str:
    """Less the punctuation around it, and brackets that hold all of it or lack their other one."""
    before = None
    while before != text:
        before = text
        text = text.strip(" \"'“”‘*_,;:!?").rstrip(".")
        text = text if re.match(r"\.[0-9]", text) else text.lstrip(".")
        if re.fullmatch(r"\([^,()]+\)|\[[^,\[\]]+\]|\{[^,{}]+\}", text):
            text = text[1:-1]
        elif not (text[:1] in "([{" and text[-1:] in ")]}"):  # (0, 1] is whole
            for opening, closing in ("()", "[]", "{}"):
                if text.count(closing) > text.count(opening):
                    text = text.removesuffix(closing)
                elif text.count(opening) > text.count(closing):
                    text = text.removeprefix(opening)
    return text


def _plain_number(number: str) -> str:
    """By its digits, so that none is too long or too precise."""
    whole, _, part = number.lstrip("+-").partition(".")
    whole, part = whole.lstrip("0") or "0", part.rstrip("0")
    plain = f"{whole}.{part}" if part else whole
    return f"-{plain}" if number.startswith("-") and plain != "0" else plain
