"""Adaptive spending: the calls saved, and the agreement with the full protocol, by threshold.

    python tests/bench/adaptive.py --data ../shared/data/llmbar/natural_verdicts.jsonl
    python tests/bench/adaptive.py --run runs/first --by orders

`--run` is a run folder that is fully labelled: the labels are made again from its paid answers for
thresholds from 0 to 1, by the code that `aif label` uses; nothing is asked. `--data` are LLMBar's
recorded verdicts of 100 pairs in both orders (Zeng et al. 2023, 2310.07641), put into a journal as
hard answers: ChatGPT is asked first, and of the panel of ChatGPT, PaLM2 and GPT-4 the others only
where ChatGPT's two orders do not agree (a hard judge knows no other margin).

Agreement is over the labels of the full protocol that name a winner; a null or an even label where
that names one does not agree. The last line is the cheapest threshold that keeps 99 %.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aif.cli.options import open_run
from aif.config.settings import LabelSettings, LLMSettings
from aif.constitution.file import Constitution
from aif.data.readers import pairs_of
from aif.judge.judge import Judge
from aif.judge.panel import EscalationStats, Panel, panel_of
from aif.stages.label import STAGE, comparisons
from aif.store import jsonl
from aif.store.journal import Journal, Reader
from aif.store.records import Comparison

THRESHOLDS = [n / 20 for n in range(21)]
KEEP = 0.99
JUDGES = ("ChatGPT", "PaLM2", "GPT-4")
RULES = {"name": "llmbar", "principle": [{"id": "better", "compare": "Which output is better?"}]}


@dataclass(frozen=True)
class Row:
    """What one threshold comes to."""

    threshold: float
    open: int  # comparisons that got more
    calls: int
    saved: float  # share of the full protocol's calls
    agreement: float | None


def sides(
    panel: Panel, rows: list[Comparison], journal: Reader
) -> tuple[list[int], EscalationStats]:
    """The side of each label (0: even or null), and what it took."""
    escalated, found = EscalationStats(panel), []
    for row in rows:
        verdicts, label = panel.judged(row, journal)
        if label is None:
            raise SystemExit("a call of the full protocol was never made: label the run in full")
        escalated.add(row, verdicts)
        p = 0.5 if label.p_first is None else label.p_first
        found.append((p > 0.5) - (p < 0.5))
    return found, escalated


def table(panel_at: Any, rows: list[Comparison], journal: Reader) -> list[Row]:
    """A row for each threshold; `panel_at` makes a panel of one, None being the full protocol."""
    full, _ = sides(panel_at(None), rows, journal)
    decided = sum(side != 0 for side in full)
    found = []
    for threshold in THRESHOLDS:
        own, escalated = sides(panel_at(threshold), rows, journal)
        same = sum(a == b for a, b in zip(own, full, strict=True) if b)
        calls = len(escalated.needed)
        saved = 1 - calls / len(escalated.full)
        found.append(
            Row(threshold, escalated.comparisons, calls, saved, same / decided if decided else None)
        )
    return found


def of_run(folder: Path, by: str) -> list[Row]:
    """The table of a run that is labelled in full."""

    def panel_at(threshold: float | None) -> Panel:
        given = {"label.escalate_below": threshold, "label.escalate": by}
        run = open_run(folder, given)
        return panel_of(run.settings)

    run = open_run(folder, {})
    with run.answers(STAGE) as journal:
        return table(panel_at, list(comparisons(run)), journal)


def of_recorded(data: Path, work: Path) -> list[Row]:
    """The table of the recorded judges, their Vanilla prompt."""
    items = {row["id"]: row for _, row in jsonl.read(data.with_name("natural.jsonl"))}
    pairs = {name: next(iter(pairs_of(row, name))).comparison for name, row in items.items()}
    constitution = Constitution.model_validate(RULES)
    full = LabelSettings(protocol="pairwise", quorum=0.5)
    judges = {name: Judge(constitution, LLMSettings(model=name), full) for name in JUDGES}
    with Journal.open(work / "journal.jsonl") as journal:
        for _, row in jsonl.read(data):
            if row["method"] == "Vanilla" and row["judge"] in judges:
                for answer in answers(judges[row["judge"]], pairs[row["item"]], row):
                    journal.append(answer)
        journal.commit()

        def panel_at(threshold: float | None) -> Panel:
            update = {"escalate_below": threshold, "escalate": "panel"}
            label = full.model_copy(update=update)
            return Panel(list(judges.values()), label, dict.fromkeys(JUDGES, 1.0))

        return table(panel_at, list(pairs.values()), journal)


def answers(judge: Judge, pair: Comparison, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Journal rows of a recorded judge's verdicts ("1", "2" or null, of the original order)."""
    for call in judge.calls_for(pair):
        winner = row[f"order_{call.order}"]
        letter = {"1": "AB", "2": "BA"}.get(winner or "", "??")[call.order == "ba"]
        fault = "unparsed" if winner is None else None
        yield {
            "id": call.id, "fault": fault, "texts": [letter], "finish": "stop", "logprobs": None,
            "detail": "", "usage": {},
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--run", type=Path, help="a run folder, labelled in full")
    given.add_argument("--data", type=Path, help="natural_verdicts.jsonl, natural.jsonl beside it")
    parser.add_argument("--by", default="orders", help="orders, panel or reasoned; for --run")
    parser.add_argument("--json", action="store_true", help="one JSON object a threshold instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        if options.run:
            rows = of_run(options.run, options.by)
        else:
            rows = of_recorded(options.data, Path(work))
    if options.json:
        print("\n".join(json.dumps(vars(row)) for row in rows))
        return
    print("threshold   got more    calls    saved   agreement")
    for row in rows:
        told = "-" if row.agreement is None else f"{row.agreement:.3f}"
        print(f"{row.threshold:9.2f} {row.open:10,} {row.calls:8,} {row.saved:8.1%} {told:>11}")
    kept = [row for row in rows if (row.agreement or 0) >= KEEP]
    best = max(kept, key=lambda row: row.saved)
    print(f"{KEEP:.0%} agreement is kept from {best.threshold:.2f} on: {best.saved:.1%} saved")


if __name__ == "__main__":
    main()
