"""The stages in their order: each reads files of the run folder and writes others.

    aif run runs/demo [--from STAGE] [--until STAGE] [--only STAGE]

`STAGES` is the list of all. A stage runs again only if a file that it reads, or a setting that it
depends on, has changed. RUN/pipeline.json has the digests of these and of the files that it wrote.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

from aif.config.settings import VLLM, Settings
from aif.config.templates import BUILTIN
from aif.config.versions import for_digest
from aif.errors import InputError, shown
from aif.llm.dispatch import check_faults
from aif.models.malloc import give_back_memory
from aif.progress import Progress
from aif.run import Run
from aif.store import fingerprint
from aif.store.records import content_id


@dataclass(frozen=True, slots=True)
class Stage:
    """A verb of a run: `code(run, progress)` makes the files `writes` from the files `reads`."""

    name: str
    code: str  # MODULE:FUNCTION in aif
    settings: str  # tables and keys of run.toml
    reads: str  # files of the run, if they exist; "*": all files of the stages before it
    writes: str

    def function(self) -> Callable[[Run, Progress], dict[str, Any]]:
        """The stage's function; its module is imported only now."""
        module, _, name = self.code.partition(":")
        return getattr(import_module(f"aif.{module}"), name)


# fmt: off
STAGES = (
    Stage("respond", "stages.respond:respond", "policy respond",
          "",
          "prompts.jsonl responses.jsonl"),
    Stage("vote", "stages.vote:vote", "vote",
          "prompts.jsonl responses.jsonl",
          "votes.jsonl"),
    Stage("revise", "stages.revise:revise", "policy reviser revise label.constitution",
          "prompts.jsonl responses.jsonl",
          "revisions.jsonl"),
    Stage("filter", "stages.filter:filter", "judge label revise.constitution",
          "prompts.jsonl responses.jsonl revisions.jsonl",
          "kept.jsonl"),
    Stage("sft", "train.sft:sft", "policy sft",
          "prompts.jsonl responses.jsonl votes.jsonl revisions.jsonl kept.jsonl",
          "sft"),
    Stage("resample", "stages.respond:resample", "policy respond",
          "sft",
          "resampled.jsonl"),
    Stage("compare", "stages.compare:compare", "compare",
          "prompts.jsonl responses.jsonl resampled.jsonl",
          "comparisons.jsonl"),
    Stage("label", "stages.label:label", "judge panel label revise.constitution",
          "comparisons.jsonl",
          "comparisons.jsonl verdicts.jsonl labels.jsonl"),
    Stage("reward", "train.reward.train:reward", "policy reward",
          "prompts.jsonl responses.jsonl resampled.jsonl revisions.jsonl labels.jsonl human.jsonl "
          "sft",
          "reward"),
    Stage("ppo", "stages.ppo:ppo", "policy judge label revise.constitution reward ppo",
          "prompts.jsonl responses.jsonl votes.jsonl revisions.jsonl kept.jsonl sft reward",
          "ppo"),
    Stage("evaluate", "evaluation.evaluate:evaluate",
          "policy judge label revise.constitution reward ppo.model evaluate",
          "*",
          "evaluate.json evaluation.jsonl"),
    Stage("report", "report:report", "",
          "* audit.json",
          "report.html"),
)
# fmt: on
AGAIN = ("respond", "compare", "label", "reward", "ppo")  # the stages of each later iteration
STATE = "pipeline"


@dataclass(frozen=True, slots=True)
class Step:
    """A stage of a run, or of a later iteration with a name like 2/ppo."""

    run: Run
    stage: Stage
    name: str


def stage(name: str) -> Stage:
    """The stage of that name. Raises InputError if there is none."""
    for stage in STAGES:
        if stage.name == name:
            return stage
    names = ", ".join(stage.name for stage in STAGES)
    raise InputError("pipeline", "stages", got=shown(name), expected=f"one of {names}")


def steps(run: Run) -> list[Step]:
    """The steps of `aif run` in their order.

    Each iteration after the first is a run in its own folder. It starts with the policy of the
    previous iteration.
    """
    names = run.settings.pipeline.stages or due(run.settings)
    last = [name for name in names if name in ("evaluate", "report")]
    first = [Step(run, stage(name), name) for name in names if name not in last]
    before, later = run, []
    for number in range(2, run.settings.pipeline.iterations + 1):
        before = _iteration(run, number, before)
        later += [Step(before, stage(name), f"{number}/{name}") for name in AGAIN]
    return first + later + [Step(run, stage(name), name) for name in last]


def due(settings: Settings) -> list[str]:
    """The stages that a run with these settings has by default."""
    left_out = set() if settings.sft.filtered else {"filter"}
    left_out |= set() if "votes" in settings.sft.data else {"vote"}
    if not settings.respond.prompts:  # the run has pairs, not prompts
        return ["label", "report"]
    return [stage.name for stage in STAGES if stage.name not in left_out]


def _iteration(run: Run, number: int, before: Run) -> Run:
    settings, respond = run.settings, run.settings.respond
    fresh = {"model": None}  # so that it starts from the new policy
    return run.child(
        str(number),
        policy=settings.policy.of_weights(str(before.file("ppo"))),
        respond=respond.model_copy(update={"samples": respond.sft_samples or respond.samples}),
        reward=settings.reward.model_copy(update=fresh),
        ppo=settings.ppo.model_copy(update=fresh),
    )


def select(
    every: Sequence[Step], first: str | None, until: str | None, only: str | None
) -> Sequence[Step]:
    """The steps from `first` to `until`, or `only` one. Raises InputError for another name."""
    names = [step.name for step in every]
    for option, name in (("--from", first), ("--until", until), ("--only", only)):
        if name is not None and name not in names:
            raise InputError("run", option, got=name, expected=f"one of {', '.join(names)}")
    begin = names.index(only or first or names[0])
    end = names.index(only or until or names[-1])
    if end < begin:
        raise InputError("run", "--until", got=until, expected=f"{first} or a stage after it")
    return every[begin : end + 1]


def remaining(todo: Sequence[Step]) -> Sequence[Step]:
    """The steps that are left: the first that is not done, and all after it, since they may read
    what it writes."""
    first = next((n for n, step in enumerate(todo) if not _is_done(step, _inputs(step))), len(todo))
    return todo[first:]


def run_all(
    todo: Sequence[Step], progress: Progress, expected_s: Mapping[str, float | None] | None = None
) -> dict[str, Any]:
    """Run the steps that are not done, in their order; returns their summaries by name.

    Raises TooManyFaults after a stage with too many failed calls, so no model is trained on its
    results. `expected_s` has the seconds that a step is expected to take.
    """
    summaries, expected_s = {}, expected_s or {}
    for number, step in enumerate(todo, 1):
        head = f"[{number}/{len(todo)}] {step.name}"
        inputs = _inputs(step)
        if _is_done(step, inputs):
            progress.say(f"{head}: nothing has changed since it was done")
            continue
        progress.stage(head, expected_s.get(step.name))
        began = time.monotonic()
        summaries[step.name] = summary = step.stage.function()(step.run, progress)
        give_back_memory()
        if "fault_rate" in summary:
            check_faults(summary, allowed_fault_rate(step.run, step.stage.name))
        if not summary.get("faults") and not summary.get("unfinished"):
            _keep_done(step, inputs, time.monotonic() - began)
    return summaries


def allowed_fault_rate(run: Run, stage: str) -> float:
    """The share of a stage's calls that may fail."""
    settings = run.settings
    return (settings.revise if stage == "revise" else settings.label).max_fault_rate


def _is_done(step: Step, inputs: str) -> bool:
    kept = step.run.state(STATE).get(step.stage.name, {})
    return kept.get("inputs") == inputs and kept["outputs"] == _outputs(step)


def _keep_done(step: Step, inputs: str, seconds: float) -> None:
    kept = {"inputs": inputs, "outputs": _outputs(step), "seconds": round(seconds, 1)}
    step.run.write_state(STATE, step.run.state(STATE) | {step.stage.name: kept})


def _inputs(step: Step) -> str:
    """The digest of all that a step depends on. A setting that names a file or a model counts by
    the content; a file that the step itself writes is an output and does not count."""
    tables = for_digest(step.run.settings, mode="json")
    for table in filter(None, (tables[name] for name in ("policy", "reviser", "judge", "label"))):
        table.pop("price", None)  # the answers do not depend on what calls cost
        table.pop("budget", None)
    settings = {}
    for key in step.stage.settings.split():
        table, _, name = key.partition(".")
        settings[key] = tables[table][name] if name else tables[table]
    named = [(name, fingerprint.of(name)) for name in _files_in(settings)]
    files = {name: step.run.file(name) for name in _reads(step) if name not in _writes(step)}
    templates = [fingerprint.of(path) for path in sorted(BUILTIN.iterdir())]
    return content_id(
        metadata.version("aif"), settings, templates, named,
        [(name, fingerprint.of(path)) for name, path in files.items()],
    )  # fmt: skip


def _outputs(step: Step) -> list[str | None]:
    return [fingerprint.of(step.run.file(name)) for name in _writes(step)]


def _writes(step: Step) -> list[str]:
    return step.stage.writes.split()


def _reads(step: Step) -> list[str]:
    named = step.stage.reads.split()
    if "*" not in named:
        return named
    named.remove("*")
    before = STAGES[: STAGES.index(step.stage)]
    own = [name for stage in before for name in stage.writes.split()]
    later = range(2, step.run.settings.pipeline.iterations + 1)
    own += [f"{number}/{name}" for number in later for name in ("labels.jsonl", "ppo")]
    return own + named


def _files_in(value: Any) -> Iterator[str]:
    """Every text in the settings that names a file or folder, FILE.py:FUNCTION, or RUN:POLICY."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _files_in(key)
            yield from _files_in(one)
    elif isinstance(value, list):
        for one in value:
            yield from _files_in(one)
    elif isinstance(value, str):
        value = value.removeprefix(VLLM)
        head, _, tail = value.rpartition(":")
        names = (value, head, f"{head}/{tail}") if head else (value,)
        yield from (name for name in names if fingerprint.of(name) is not None)
