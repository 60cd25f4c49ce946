"""What a run folder holds, for a person who looks in."""

from __future__ import annotations

from typing import Any

from aif.constitution import Constitution
from aif.pipeline import STAGES
from aif.run import Run


def status(run: Run) -> dict[str, Any]:
    """Stages with their counts. Reads only, so it may run while a stage is writing."""
    stages = {}
    for stage in STAGES:
        state = run.state(stage.name)
        index = run.index(stage.name)
        stages[stage.name] = {
            "done": run.file(stage.writes).exists(),
            "answers": len(index.answered),
            "faults": len(index.failed),
            "damaged_lines": len(index.damage),
            **{key: state[key] for key in _SHOWN if key in state},
        }
    waiting = [name for name, stage in stages.items() if not stage["done"]]
    return {"run": str(run.path), "stages": stages, "next": _next(run, stages, waiting)}


_SHOWN = ("responses", "comparisons", "labels", "labels_null", "unfinished", "faults_by", "tokens")


def _next(run: Run, stages: dict[str, Any], waiting: list[str]) -> str:
    labelled = stages["label"]
    if labelled["done"]:
        if labelled.get("unfinished") or labelled["faults"]:
            return f"aif label --out {run.path}"
        return f"aif export {run.path}"
    started = run.settings.respond.prompts or not run.settings.label.pairs
    return (
        f"aif {waiting[0]} {run.path}"
        if started and waiting[0] != "label"
        else (f"aif label --out {run.path}")
    )


def lines(summary: dict[str, Any]) -> list[str]:
    """A line a stage, and the command that comes next."""
    told = [summary["run"]]
    for name, stage in summary["stages"].items():
        facts = [f"{stage['answers']:,} answers", f"{stage['faults']:,} faults"]
        facts += [f"{stage[key]:,} {key}" for key in _SHOWN if isinstance(stage.get(key), int)]
        if stage["damaged_lines"]:
            facts.append(f"{stage['damaged_lines']:,} damaged lines")
        told.append(f"  {name:8} {'done' if stage['done'] else '-':5} {', '.join(facts)}")
    return [*told, f"next: {summary['next']}"]


def constitution_lines(constitution: Constitution) -> list[str]:
    """A constitution as a person reads it."""
    rule = f"{constitution.principles} principles, combined by {constitution.combine}"
    told = [f"{constitution.name}: {constitution.description or 'no description'}", rule]
    told.append(f"digest {constitution.digest()}")
    for principle in constitution.principle:
        told.append(f"\n{principle.id}  weight {principle.weight:g}")
        for key in ("critique", "revision", "compare", "grade"):
            if text := getattr(principle, key):
                told.append(f"  {key:9} {text}")
        if principle.example:
            yes = sum(example.verdict for example in principle.example)
            told.append(f"  examples  {yes} yes, {len(principle.example) - yes} no")
    return told
