"""Text from a stranger, with what cannot be seen written out: U+202E becomes \u27e8U+202E\u27e9.

Overrides of the writing direction (Boucher and Anderson 2021, 2111.00169), control characters and
other invisible ones would otherwise reorder a page or hide in it.
"""

from __future__ import annotations

import re
from typing import Any

_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls, but for tab and newline
    "\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb\ud800-\udfff"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
    # Joiners and variation selectors belong into emoji and into many scripts, but only behind a
    # letter or picture of theirs (a selector also before a keycap).
    "|(?<![^\x00-\x7f\u200c\u200d])[\u200c\u200d]"
    "|(?<![^\x00-\x7f\u200c\u200d\ufe00-\ufe0f])[\ufe00-\ufe0f](?!\u20e3)"
)


def visible(text: str) -> str:
    """`text` with every hidden character as its code point; what comes out is valid UTF-8."""
    return _HIDDEN.sub(_code_point, text.replace("\r\n", "\n"))


def _code_point(match: re.Match[str]) -> str:
    return f"\u27e8U+{ord(match[0]):04X}\u27e9"


def cleaned(value: Any) -> Any:
    """Parsed JSON with every text in it, keys too, made `visible`."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible(key): cleaned(inner) for key, inner in value.items()}
    return [cleaned(inner) for inner in value] if isinstance(value, list) else value
