"""What a run would ask and what that comes to, before anything is asked or written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from aif.compare import pairs
from aif.judging import asks_for, constitution_path, count, judge_of
from aif.label import STAGE, changes, comparisons, facts, own_comparisons
from aif.llm import open_llm
from aif.pairs import read_pairs, read_prompts, unique
from aif.pipeline import steps
from aif.records import Comparison, Prompt
from aif.run import Run


def plan(run: Run) -> dict[str, Any]:
    """What `aif label` would do with the same settings, and what comes before it in `aif run`.

    Where the responses are still to be sampled, they are taken to be as many and as long as the
    settings allow: calls and tokens are then at most what is said.
    """
    path = constitution_path(run)
    with open_llm(run.settings.judge) as llm:
        judge = judge_of(run, path, llm.control_tokens)
        work = count(judge, _comparisons(run), run.index(STAGE))
        tokens, exact = llm.count_tokens(asks_for(judge, _comparisons(run), work.missing))
    by_principle = Counter(work.missing.values())
    sampled = _is_to_be_sampled(run)
    return {
        "run": str(run.path),
        "sampling": _sampling(run) if sampled else {},
        "comparisons": work.comparisons,
        "calls": len(work.missing),
        "calls_kept": work.kept,
        "calls_after_fault": work.failed_before,
        "answers_unused": work.unused,
        "calls_by_principle": dict(by_principle.most_common()),
        "prompt_tokens": tokens,
        "prompt_tokens_are": "at most" if sampled else "exact" if exact else "an estimate",
        "completion_tokens_at_most": (
            len(work.missing) * judge.model.verdict_tokens * judge.model.samples
        ),
        "changes": changes(run.state(STAGE), facts(judge, path, {})),
        "protocol": judge.protocol,
        "judge": judge.model.model,
    }


def _comparisons(run: Run) -> Iterator[Comparison]:
    """What `aif label` will have to judge once what comes before it is done."""
    label = run.settings.label
    if label.pairs is not None:
        found = unique(islice(read_pairs(label.pairs), label.limit))
        return (pair.comparison for pair, is_new in found if is_new)
    if _is_to_be_sampled(run):
        return islice(_expected(run), label.limit)
    own_comparisons(run)
    return comparisons(run)


def _is_to_be_sampled(run: Run) -> bool:
    settings = run.settings
    given = settings.label.pairs is not None or run.file("comparisons.jsonl").exists()
    return not given and settings.respond.prompts is not None


def _expected(run: Run) -> Iterator[Comparison]:
    """Comparisons of responses that are as long as they may be."""
    words = "word " * run.settings.policy.response_tokens
    texts = [f"{words}{number}" for number in range(_samples(run))]
    for prompt in _prompts(run):
        yield from pairs(run, prompt, texts)


def _prompts(run: Run) -> list[Prompt]:
    settings = run.settings.respond
    return list(islice(read_prompts(settings.prompts), settings.limit))


def _samples(run: Run) -> int:
    """Of those responses to a prompt that are compared."""
    settings = run.settings.respond
    again = any(step.name == "resample" for step in steps(run))
    return (again and settings.resamples) or settings.samples


def _sampling(run: Run) -> dict[str, int]:
    """Calls of the stages of `aif run` that come before labels, at most."""
    settings = run.settings
    prompts = len(_prompts(run))
    responses = prompts * settings.respond.samples
    revised = min(responses, settings.revise.limit or responses)
    each = {"respond": responses, "resample": prompts * _samples(run)}
    each["revise"] = revised * settings.revise.rounds * 2
    return {step.name: each[step.name] for step in steps(run) if step.name in each}
