"""What calls cost, in dollars.

>>> Price.of("0.15/0.60").cost(prompt_tokens=1_000_000, completion_tokens=500_000)
0.45
>>> dollars(12.3), dollars(0.00123456)
('$12.30', '$0.00123')
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

PER = 1_000_000  # tokens that a price is of
EXPECTED = "dollars a million prompt tokens / completion tokens, as 0.15/0.60"
_NUMBER = r"(\d{1,9}(?:\.\d{1,9})?)"
_PRICE = re.compile(f"{_NUMBER}/{_NUMBER}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Price:
    """Dollars a million tokens of prompt, and of completion."""

    prompt: float
    completion: float

    @classmethod
    def of(cls, text: str) -> Price:
        """The price in `0.15/0.60`. Raises ValueError for anything else."""
        match = _PRICE.fullmatch(text)
        if match is None:
            raise ValueError(EXPECTED)
        return cls(float(match[1]), float(match[2]))

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Dollars for so many tokens."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / PER


def dollars(amount: float) -> str:
    """An amount for a person: to the cent, or below a dollar to three digits."""
    places = 2 if amount >= 1 or amount <= 0 else min(9, 2 - math.floor(math.log10(amount)))
    return f"${amount:,.{places}f}"


def checked_price(text: str | None) -> str | None:
    """The text, for a setting that holds a price. Raises ValueError as `Price.of` does."""
    if text is not None:
        Price.of(text)
    return text
