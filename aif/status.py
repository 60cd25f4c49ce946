"""The status of a run: its stages, their results, and the next command."""

from __future__ import annotations

from typing import Any

from aif.llm.budget import cost_of
from aif.pipeline import STAGES, steps
from aif.run import Run

# The keys of a stage's summary that are shown, if it has them.
COUNTS = ("prompts", "responses", "votes", "revisions", "kept", "examples", "steps")
COUNTS += ("comparisons", "labels", "pairs", "unfinished")


def status(run: Run) -> dict[str, Any]:
    """The status of the stages that have begun. It only reads, so a stage may be writing."""
    stages = {}
    for stage in STAGES:
        index, state = run.index(stage.name), run.state(stage.name)
        written = all(run.file(name).exists() for name in stage.writes.split())
        page = stage.name == "report" and written  # the report keeps no state of its own
        if state or index.answered or index.failed or page:
            stages[stage.name] = {
                **{key: state[key] for key in COUNTS if key in state},
                "null": sum(state.get("labels_null", {}).values()),
                "answers": len(index.answered),
                "faults": len(index.failed),
                "damaged_lines": len(index.damage),
                "tokens": state.get("tokens", {}),
                "cost": cost_of(run, stage.name),
                **_outcome(stage.name, state),
                "written": written,
            }
    due = [step.name for step in steps(run)]
    return {"run": str(run.path), "stages": stages, "due": due, "next": _next(run, stages)}


def _outcome(name: str, state: dict[str, Any]) -> dict[str, Any]:
    """The results of training, evaluation and report, in a few words."""
    lines = ["report.html"] if name == "report" else []
    ai = state.get("card", {}).get("ai") if name == "reward" else None
    if ai and ai["accuracy"] is not None:
        lines.append(f"{ai['accuracy']:.2f} of {ai['n']:,} held-out labels right")
    if name == "ppo" and "last" in state:
        first, last = state["first"], state["last"]
        lines.append(f"score {first['objective/scores']:.2f} -> {last['objective/scores']:.2f}")
        lines.append(f"KL {last['objective/kl']:.1f}")
    for match in state.get("matches", ()):
        rate = match["win_rate"]["mean"]
        result = "has no result" if rate is None else f"wins {rate:.0%}"
        lines.append(f"{match['first']} {result} against {match['second']}")
    return {"outcome": lines}


def _next(run: Run, stages: dict[str, Any]) -> str:
    """The next command: for the first stage that is not complete."""
    due = {step.name for step in steps(run)} - {"report"}
    begun = [stage.name in stages.keys() - {"report"} for stage in STAGES]
    for number, stage in enumerate(STAGES):
        row = stages.get(stage.name)
        if not row and (stage.name not in due or any(begun[number:])):
            continue
        if not row or not row["written"] or row["faults"] or row.get("unfinished"):
            return f"aif {stage.name} {'--out ' if stage.name == 'label' else ''}{run.path}"
    return f"aif export {run.path}"
