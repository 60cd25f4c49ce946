"""What people chose between two responses, with all that a row says besides for an audit.

    {"prompt": "...", "chosen": "...", "rejected": "...", "subset": "harmless"}
    {"prompt": "...", "response_a": "...", "response_b": "...", "label": "a", "gpt-4": "b",
     "model_a": "llama-7b", "model_b": "bloom-7b"}
    {"instruction": "...", "response1": "...", "response2": "...", "annotators": [1, 1, 0]}

A choice is 1, "a", "A", "first" or "model_a" for the first response, 2, "b", "B", "second" or
"model_b" for the second, 0 or "tie" for neither. It may stand in `label`, `winner` or `preference`,
several people's in `annotators`; `chosen` and `rejected`, `scores` and `ranks` are choices too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from aif.data.readers import pairs_of, read_rows
from aif.errors import InputError, shown
from aif.run import Run
from aif.stats.odds import outcome
from aif.store.records import Comparison, HumanChoice, Verdict

FIRST, SECOND, TIE = 1.0, 0.0, 0.5
CHOICES = {
    FIRST: (1, "1", "a", "A", "first", "model_a"),
    SECOND: (2, "2", "b", "B", "second", "model_b"),
    TIE: (0, "0", "tie", "Tie", "both", "neither", "tie (bothbad)"),
}
_CHOICE_OF = {name: choice for choice, names in CHOICES.items() for name in names}
COLUMNS = ("label", "winner", "preference")
MODELS = (("model_a", "model_b"), ("chosen_model", "rejected_model"))


@dataclass(frozen=True, slots=True)
class Item:
    """A pair without its texts, as an audit needs it."""

    comparison_id: str
    prompt_id: str
    more_words: int  # of the first response than of the second
    choices: tuple[float, ...]  # a person each: FIRST, SECOND or TIE
    subset: str | None = None
    models: tuple[str, str] | None = None  # that wrote the first and the second
    # By column. The order is "ab", "ba", or "" where it is not known.
    recorded: dict[str, tuple[Verdict, ...]] = field(default_factory=dict)

    @property
    def people(self) -> float | None:
        """The choice with the most people; None without choices and for a tie of choices."""
        ranked = Counter(self.choices).most_common(2)
        if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
            return None
        return ranked[0][0]


def read_items(source: str, limit: int | None, columns: Sequence[str]) -> Iterator[Item]:
    """The items of a file of pairs; `columns` hold the verdicts of recorded judges.

    Raises InputError for a row that is no pair, lacks such a column, or has no valid choice in it.
    """
    items = (
        _item(row, place, pair.comparison, pair.human, columns)
        for place, row in read_rows(source)
        for pair in pairs_of(row, place)
    )
    return islice(items, limit)


def items_of(run: Run) -> Iterator[Item]:
    """The comparisons of a run, with the choices of people if it has any."""
    chosen: dict[str, tuple[float, ...]] = {}
    for row in run.read("human.jsonl", HumanChoice, missing_ok=True):
        chosen[row.comparison_id] = (*chosen.get(row.comparison_id, ()), outcome(row.p_first))
    for row in run.read("comparisons.jsonl", Comparison):
        yield Item(row.id, row.prompt_id, _more_words(row), chosen.get(row.id, ()))


def _item(
    row: dict[str, Any],
    place: str,
    comparison: Comparison,
    human: HumanChoice | None,
    columns: Sequence[str],
) -> Item:
    # Chosen and rejected were put in an order of their own; in the row the chosen one is the first.
    turned = human is not None and human.p_first == SECOND and "chosen" in row
    choices = _choices(row, place)
    if choices and turned:
        choices = [1 - choice for choice in choices]
    elif human and not choices:
        choices = [outcome(human.p_first)]
    subset = row.get("subset")
    return Item(
        comparison.id,
        comparison.prompt_id,
        _more_words(comparison),
        tuple(choices),
        None if subset is None else str(subset),
        _models(row, turned),
        {column: _recorded(row, place, column, comparison.id, turned) for column in columns},
    )


def _choices(row: dict[str, Any], place: str) -> list[float]:
    """What the row's own columns say that people chose."""
    if "annotators" not in row:
        columns = [key for key in COLUMNS if row.get(key) is not None]
        return [_choice(row[key], place, key) for key in columns[:1]]
    choices = row["annotators"]
    if not isinstance(choices, list):
        raise InputError(place, "annotators", got=shown(choices), expected="a list of choices")
    return [_choice(one, place, "annotators") for one in choices]


def _more_words(row: Comparison) -> int:
    return len(row.first.split()) - len(row.second.split())


def _choice(value: Any, place: str, key: str) -> float:
    if isinstance(value, str | int) and not isinstance(value, bool) and value in _CHOICE_OF:
        return _CHOICE_OF[value]
    raise InputError(
        place, key, got=shown(value), expected="1, 2, 0, 'a', 'b', 'tie', 'model_a' or 'model_b'"
    )


def _models(row: dict[str, Any], turned: bool) -> tuple[str, str] | None:
    for first, second in MODELS:
        if isinstance(row.get(first), str) and isinstance(row.get(second), str):
            return (row[second], row[first]) if turned else (row[first], row[second])
    return None


def _recorded(
    row: dict[str, Any], place: str, column: str, comparison_id: str, turned: bool
) -> tuple[Verdict, ...]:
    """The verdicts in a judge's column: one, or one for each order; null is a missing verdict."""
    if column not in row:
        raise InputError(
            place, column, got="nothing", expected="a recorded verdict, null where there was none"
        )
    choices = row[column] if isinstance(row[column], dict) else {"": row[column]}
    if not choices.keys() <= {"", "ab", "ba"}:
        raise InputError(
            place, column, got=shown(choices), expected="a choice, or ab and ba of them"
        )
    verdicts = []
    for order, value in choices.items():
        choice, fault = (
            (None, "unparsed") if value is None else (_choice(value, place, column), None)
        )
        verdicts.append(Verdict("", comparison_id, "", order, column, None, choice, fault, {}))
    return tuple(map(Verdict.swapped, verdicts) if turned else verdicts)
