"""A run's report: its files -> report.html, one page that can be mailed and needs no network.

    aif report runs/first

Reads what the stages have left and asks no model. What a stage has not left is left out, with the
verb that makes it. The same files make the same page, byte for byte.
"""

from __future__ import annotations

from typing import Any

from aif.dependencies import require
from aif.errors import AifError
from aif.progress import Progress
from aif.report import sections
from aif.report.audit import audited
from aif.report.browser import browsed
from aif.report.judge_stats import survey
from aif.report.overview import funnel, what_ran
from aif.report.page import rendered
from aif.report.schema import Evaluation, TrainState, state
from aif.report.tiles import tiles
from aif.run import Run
from aif.store import jsonl

FILE = "report.html"
BUDGET = 20_000_000  # bytes of texts on the page, about


def report(run: Run, progress: Progress) -> dict[str, Any]:
    """Write RUN/report.html; returns its size and which parts it has.

    It may be called while a stage writes to the run, whose files are whole at every moment. Raises
    InputError for a file that is not as aif writes it, AifError where there is nothing to report.
    """
    require("report", "matplotlib", "scipy")
    progress.say(f"report: reading {run.path}")
    judged = survey(run)
    evaluation = state(run, "evaluate", Evaluation)
    ppo = state(run, "ppo", TrainState)
    measured = sections.measured(run)
    parts = {
        "funnel": funnel(run, judged),
        "judging": sections.judging(judged),
        "audit": audited(run),
        "reward": sections.reward_model(run),
        "training": sections.training(measured),
        "kl": sections.overoptimisation(measured, ppo, evaluation),
        "evaluation": sections.evaluated(evaluation),
    }
    seed = run.settings.label.seed
    data = browsed(run, judged, seed, BUDGET)
    if not any(parts.values()) and not data["counts"]:
        raise AifError(f"{run.path}: nothing to report: no stage has left its files there")
    content = {
        "ran": what_ran(run, judged),
        "tiles": tiles(measured, ppo and ppo.best_step, evaluation, parts["judging"]),
        **parts,
        "browser": {
            "counts": data["counts"],
            "bytes": data["bytes"],
            "seed": seed,
            "principles": data["principles"],
            "pairwise": any(tally.swaps for tally in judged.tallies.values()),
            "human": bool(judged.human),
        },
    }
    page = rendered(content, data)
    with jsonl.replacing(run.file(FILE)) as file:
        file.write(page)
    return {
        "run": str(run.path),
        "file": str(run.file(FILE)),
        "bytes": len(page),
        "parts": [name for name, part in parts.items() if part]
        + ["browser"] * bool(data["counts"]),
        "browsed": data["counts"],
    }
