"""What a run folder holds, for a person who looks in."""

from __future__ import annotations

from typing import Any

from aif.config.price import dollars
from aif.constitution.file import Constitution
from aif.llm.budget import cost_of
from aif.pipeline import STAGES, steps
from aif.run import Run

# What is shown of a stage's summary, where it has it.
COUNTS = ("prompts", "responses", "votes", "revisions", "kept", "examples", "steps")
COUNTS += ("comparisons", "labels", "pairs", "unfinished")


def status(run: Run) -> dict[str, Any]:
    """The stages that were begun. Reads only, so it may run while a stage is writing."""
    stages = {}
    for stage in STAGES:
        index, state = run.index(stage.name), run.state(stage.name)
        if state or index.answered or index.failed:
            stages[stage.name] = {
                **{key: state[key] for key in COUNTS if key in state},
                "null": sum(state.get("labels_null", {}).values()),
                "answers": len(index.answered),
                "faults": len(index.failed),
                "damaged_lines": len(index.damage),
                "tokens": state.get("tokens", {}),
                "cost": cost_of(run, stage.name),
                **_outcome(stage.name, state),
                "written": all(run.file(name).exists() for name in stage.writes.split()),
            }
    due = [step.name for step in steps(run)]
    return {"run": str(run.path), "stages": stages, "due": due, "next": _next(run, stages)}


def _outcome(name: str, state: dict[str, Any]) -> dict[str, Any]:
    """What training and evaluation came to, in a few words."""
    told = []
    ai = state.get("card", {}).get("ai") if name == "reward" else None
    if ai and ai["accuracy"] is not None:
        told.append(f"{ai['accuracy']:.2f} of {ai['n']:,} held-out labels right")
    if name == "ppo" and "last" in state:
        first, last = state["first"], state["last"]
        told.append(f"score {first['objective/scores']:.2f} -> {last['objective/scores']:.2f}")
        told.append(f"KL {last['objective/kl']:.1f}")
    for match in state.get("matches", ()):
        rate = match["win_rate"]["mean"]
        shown = "has no result" if rate is None else f"wins {rate:.0%}"
        told.append(f"{match['first']} {shown} against {match['second']}")
    return {"outcome": told}


def _next(run: Run, stages: dict[str, Any]) -> str:
    """The command that takes the run further: the first stage that is not done, or that comes
    after all that were begun."""
    wanted = {step.name for step in steps(run)} - {"report"}
    begun = [stage.name in stages for stage in STAGES]
    for number, stage in enumerate(STAGES):
        found = stages.get(stage.name)
        if not found and (stage.name not in wanted or any(begun[number:])):
            continue
        if not found or not found["written"] or found["faults"] or found.get("unfinished"):
            return f"aif {stage.name} {'--out ' if stage.name == 'label' else ''}{run.path}"
    return f"aif export {run.path}"


def lines(summary: dict[str, Any]) -> list[str]:
    """A line a stage, and the command that comes next."""
    told = [summary["run"]]
    for name in dict.fromkeys([*summary["due"], *summary["stages"]]):
        stage = summary["stages"].get(name)
        if stage is None:
            told.append(f"  {name:8} -")
            continue
        facts = [f"{stage[key]:,} {key}" for key in COUNTS if stage.get(key)]
        for key in ("null", "answers", "faults", "damaged_lines"):
            facts += [f"{stage[key]:,} {key.replace('_', ' ')}"] if stage[key] else []
        facts += [f"{n:,} {kind.replace('_', ' ')}" for kind, n in stage["tokens"].items()]
        facts += [f"{dollars(stage['cost'])} spent"] if stage["cost"] else []
        told.append(f"  {name:8} {', '.join([*facts, *stage['outcome']])}")
    return [*told, f"next: {summary['next']}"]


def constitution_lines(constitution: Constitution) -> list[str]:
    """A constitution as a person reads it."""
    told = [f"{constitution.name}: {constitution.description or 'no description'}"]
    told.append(f"{constitution.principles} principles, combined by {constitution.combine}")
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
