"""Scores of any pairs: FILE -> scores.jsonl, and their accuracy if the file has choices.

{"comparison_id": "...", "prompt_id": "...", "score_first": 1.2, "score_second": -0.4,
 "p_first": 0.83, "p_human": 1.0}
"""

from __future__ import annotations

from typing import Any

from aif.data.readers import read_pairs
from aif.errors import InputError
from aif.progress import Progress
from aif.run import Run
from aif.stats.odds import probability
from aif.store import jsonl
from aif.train.reward.card import report_card
from aif.train.reward.evaluate import score_comparisons
from aif.train.reward.labeled import LabeledComparison
from aif.train.reward.model import load_ensemble

STAGE = "score"


def score_file(run: Run, progress: Progress, source: str) -> dict[str, Any]:
    """Score every pair of `source` (shapes as for `aif label --pairs`); returns the summary.

    Raises InputError at the first bad row, AifError without a reward model.
    """
    rows = [
        LabeledComparison(pair.comparison, p_human=pair.human.p_first if pair.human else None)
        for pair in read_pairs(source)
    ]
    if not rows:
        raise InputError(source, "", got="no pairs at all", expected="at least one")
    with run.writing():
        pairs = score_comparisons(load_ensemble(run), rows)
        jsonl.write(
            run.file("scores.jsonl"),
            (
                {
                    "comparison_id": pair.comparison_id,
                    "prompt_id": pair.prompt_id,
                    "score_first": pair.score_first,
                    "score_second": pair.score_second,
                    "p_first": probability(pair.delta),
                    "p_human": pair.p_human,
                }
                for pair in pairs
            ),
        )
        summary = {"run": str(run.path), "source": source, "too_long": len(rows) - len(pairs)}
        summary |= report_card(pairs)
        run.write_state(STAGE, summary)
    return summary
