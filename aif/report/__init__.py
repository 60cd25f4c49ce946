"""A run's report: its files -> report.html, one page that can be mailed and needs no network.

    aif report runs/first

Reads the files of the stages and makes no call. A part without its files names the verb that
makes them. The same files make the same page, byte for byte.
"""

from __future__ import annotations

from typing import Any

from aif.dependencies import require
from aif.errors import AifError
from aif.evaluation.schema import Evaluation
from aif.progress import Progress
from aif.report import sections
from aif.report.audit import audit_cards
from aif.report.browser import browser_data
from aif.report.judge_stats import survey
from aif.report.overview import funnel, what_ran
from aif.report.page import render
from aif.report.schema import TrainState, state
from aif.report.tiles import tiles
from aif.run import Run
from aif.store import jsonl

FILE = "report.html"
BUDGET = 20_000_000  # bytes of texts on the page, about


def report(run: Run, progress: Progress) -> dict[str, Any]:
    """Write RUN/report.html; returns its size and which parts it has.

    It may be called while a stage writes to the run, as its files are whole at every moment. Raises
    InputError for a file that is not as aif writes it, AifError if there is nothing to report.
    """
    require("report", "matplotlib", "scipy")
    progress.say(f"report: reading {run.path}")
    labels = survey(run)
    evaluation = state(run, "evaluate", Evaluation)
    ppo = state(run, "ppo", TrainState)
    metrics = sections.metrics(run)
    parts = {
        "funnel": funnel(run, labels),
        "judging": sections.judging(labels),
        "audit": audit_cards(run),
        "reward": sections.reward_model(run),
        "training": sections.training(metrics),
        "kl": sections.score_by_kl(metrics, ppo, evaluation),
        "evaluation": sections.policies(evaluation),
    }
    seed = run.settings.label.seed
    data = browser_data(run, labels, seed, BUDGET)
    if not any(parts.values()) and not data["counts"]:
        raise AifError(f"{run.path}: nothing to report: no stage has left its files there")
    content = {
        "ran": what_ran(run, labels),
        "tiles": tiles(metrics, ppo and ppo.best_step, evaluation, parts["judging"]),
        **parts,
        "browser": {
            "counts": data["counts"],
            "bytes": data["bytes"],
            "seed": seed,
            "principles": data["principles"],
            "pairwise": bool(labels.verdicts.of().swaps),
            "human": bool(labels.human),
        },
    }
    page = render(content, data)
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
