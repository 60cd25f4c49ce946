"""Recorded judges on LLMBar (Zeng et al. 2023, 2310.07641), through our aggregation and our parser.

    python tests/bench/llmbar.py --data ../shared/data/llmbar [--json]

First table: every judge and prompting method on the 100 expert-labelled items of Natural. The
recorded final verdicts of both orders become `Verdict` rows, `aggregate_verdicts` makes labels, and
accuracy (mean of the two orders) and agreement of the orders stand beside what the authors
published. Second table: how many of the raw completions our parser reads as the authors' did.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aif.constitution.file import Constitution
from aif.data.readers import pairs_of
from aif.judge.aggregate import aggregate_verdicts
from aif.llm.verdict_text import parse_choice
from aif.store import jsonl
from aif.store.records import Comparison, Label, Verdict

CONSTITUTION = Constitution.model_validate(
    {"name": "llmbar", "principle": [{"id": "better", "compare": "Which output is better?"}]}
)


@dataclass(frozen=True)
class Row:
    """One judge and method, in percent; `label_accuracy` is that of the two orders combined."""

    judge: str
    method: str
    accuracy: float
    published_accuracy: float
    agreement: float
    published_agreement: float
    both_null: int  # items without a verdict in either order
    label_accuracy: float


def read(data: Path, name: str) -> list[dict[str, Any]]:
    return [row for _, row in jsonl.read(data / f"{name}.jsonl")]


def table(data: Path) -> list[Row]:
    """A row for each line that the authors published."""
    items = {}
    for row in read(data, "natural"):
        (pair,) = pairs_of(row, row["id"])
        items[row["id"]] = (pair.comparison, 1.0 if row["label"] == "a" else 0.0)
    recorded = defaultdict(list)
    for row in read(data, "natural_verdicts"):
        recorded[row["judge"], row["method"]].append(row)
    return [
        scored(published, recorded[published["judge"], published["method"]], items)
        for published in read(data, "natural_published")
    ]


def scored(
    published: dict[str, Any],
    recorded: list[dict[str, Any]],
    items: dict[str, tuple[Comparison, float]],
) -> Row:
    """What the verdicts of one judge and method come to, beside what was published of them."""
    right = agree = null = right_labels = 0.0
    for row in recorded:
        comparison, expert = items[row["item"]]
        verdicts, label = judged(comparison, row["order_ab"], row["order_ba"])
        right += sum(verdict.p_first == expert for verdict in verdicts) / 2
        agree += label.order_agreement or 0
        null += all(verdict.fault for verdict in verdicts)
        if label.p_first is not None:  # an even label is right by half
            right_labels += abs(label.p_first - expert) < 0.5 or (label.p_first == 0.5) / 2
    share = 100 / len(recorded)
    return Row(
        judge=published["judge"],
        method=published["method"],
        accuracy=right * share,
        published_accuracy=percent(published["correct_average"]),
        agreement=agree * share,
        published_agreement=percent(published["equal"].partition("=")[2]),
        both_null=int(null),
        label_accuracy=right_labels * share,
    )


def judged(
    comparison: Comparison, order_ab: str | None, order_ba: str | None
) -> tuple[list[Verdict], Label]:
    """Recorded winners ("1", "2" or null, of the original order) as verdicts and a label."""
    verdicts = [
        Verdict(
            id=f"{comparison.id}-{order}",
            comparison_id=comparison.id,
            principle_id="better",
            order=order,
            judge="recorded",
            text=None,
            p_first=None if winner is None else float(winner == "1"),
            fault="unparsed" if winner is None else None,
            usage={},
        )
        for order, winner in (("ab", order_ab), ("ba", order_ba))
    ]
    return verdicts, aggregate_verdicts(comparison, verdicts, CONSTITUTION, "pairwise")


def percent(text: str) -> float:
    return round(float(text.strip().removesuffix("%")), 6)


def parsed_winner(row: dict[str, Any], order: str) -> str | None:
    """The winner that our parser reads in a completion, as it is recorded.

    `winner_ba` speaks of the original responses, the text of the order in which it saw them.
    """
    choice = parse_choice(row[f"text_{order}"] or "", ("a", "b"))
    if choice is None:
        return None
    return "12"[choice] if order == "ab" else "21"[choice]


def parser_table(data: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """(judge, method) -> completions that are read as recorded, and all of them."""
    counts: dict[tuple[str, str], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for row in read(data, "natural_completions"):
        for order in ("ab", "ba"):
            same, total = counts[row["judge"], row["method"]]
            same += parsed_winner(row, order) == row[f"winner_{order}"]
            counts[row["judge"], row["method"]] = same, total + 1
    return dict(counts)


def note(row: Row) -> str:
    """Why our numbers are not the published ones; empty where they are."""
    if abs(row.accuracy - row.published_accuracy) > 1e-6:
        return "  accuracy differs"
    gap = row.published_agreement - row.agreement
    if abs(gap) < 1e-6:
        return ""
    if round(gap, 6) == row.both_null:
        return f"  {row.both_null} without a verdict in both orders: published as agreeing"
    return "  agreement differs"


def print_tables(rows: list[Row], parsed: dict[tuple[str, str], tuple[int, int]]) -> None:
    print(f"{'judge':13} {'method':25} accuracy published agreement published both-orders label")
    for row in rows:
        numbers = (row.accuracy, row.published_accuracy, row.agreement, row.published_agreement)
        told = "".join(f"{number:7.1f}   " for number in numbers)
        print(f"{row.judge:13} {row.method:25} {told} {row.label_accuracy:7.1f}{note(row)}")
    print("\ncompletions read as recorded")
    for (judge, method), (same, total) in parsed.items():
        print(f"{judge:13} {method:25} {same:4} of {total}")
    same, total = (sum(column) for column in zip(*parsed.values(), strict=True))
    print(f"{'all':39} {same:,} of {total:,}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of natural*.jsonl")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    given = parser.parse_args(arguments)
    rows, parsed = table(given.data), parser_table(given.data)
    if given.json:
        completions = {f"{judge} {method}": counts for (judge, method), counts in parsed.items()}
        print(json.dumps({"judges": [asdict(row) for row in rows], "parsed": completions}))
    else:
        print_tables(rows, parsed)


if __name__ == "__main__":
    main()
