"""What a run would ask and what that comes to, before anything is asked or written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from aif.config.price import Price
from aif.data.readers import read_pairs, read_prompts, unique
from aif.judge.calls import PendingCalls, check_models
from aif.judge.judge import Judge
from aif.judge.panel import constitution_path, panel_of
from aif.judge.provenance import changes, facts
from aif.llm import LLM, Ask, open_llm
from aif.llm.budget import LABELS, journals, most_tokens, price_of, spent_in
from aif.pipeline import steps
from aif.run import Run
from aif.stages.compare import pairs
from aif.stages.label import STAGE, comparisons, measured_rate, own_comparisons
from aif.stages.respond import asks_for as samples_for
from aif.stages.respond import read_shots
from aif.stages.revise import model_of, reviser_of
from aif.store.journal import Index, Reader
from aif.store.records import Comparison, Prompt


@dataclass(frozen=True, slots=True)
class Tokens:
    """Of some calls."""

    prompt: int
    exact: bool  # whether that is a tokenizer's count, or else an estimate
    prompt_most: int  # the most that there can be
    completion_most: int

    @classmethod
    def of(cls, llm: LLM, asks: Iterable[Ask]) -> Tokens:
        prompt = most = completion = 0
        exact = True
        for ask in asks:
            tokens, exact = llm.count_tokens([ask])
            prompt += tokens
            most += tokens if exact else most_tokens(ask)
            completion += ask.max_tokens * ask.samples
        return cls(prompt, exact, most, completion)

    def dollars(self, price: Price | None) -> dict[str, float | None]:
        """About, and at most, what they cost; both count every token that an answer may have."""
        if price is None:
            return {"about": None, "at_most": None}
        return {
            "about": price.cost(self.prompt, self.completion_most),
            "at_most": price.cost(self.prompt_most, self.completion_most),
        }


def plan(run: Run, rate: float | None = None) -> dict[str, Any]:
    """What `aif label` would do with the same settings, and what comes before it in `aif run`.

    Where the responses are still to be sampled, they are taken to be as many and as long as the
    settings allow: calls and tokens are then at most what is said. `rate` is calls a second; None:
    as in the last labelling by the same judges. Raises InputError for a budget without a price.
    """
    path = constitution_path(run.settings)
    check_models(run, STAGE, [run.settings.judge, *run.settings.panel])
    panel = panel_of(run.settings, path)
    sampled = _is_to_be_sampled(run)
    path_of_answers = run.file("journal") / f"{STAGE}.jsonl"
    with Reader.reading(path_of_answers, missing_ok=True) as journal:
        pending = PendingCalls.of(panel, comparisons_of(run), journal)
        judges = [_of_judge(run, judge, pending, journal.index) for judge in panel.judges]
    principles = Counter(name for calls in pending.missing.values() for name in calls.values())
    rate = rate or measured_rate(run, panel)
    exact = all(judge["prompt_tokens_are"] == "exact" for judge in judges)
    found = {
        "run": str(run.path),
        "sampling": _sampling(run) if sampled else {},
        "comparisons": pending.comparisons,
        "calls": pending.calls,
        "calls_perhaps": pending.conditional_calls,
        "calls_kept": pending.kept,
        "calls_after_fault": pending.failed_before,
        "answers_unused": pending.unused,
        "calls_by_principle": dict(principles.most_common()),
        "prompt_tokens": sum(judge["prompt_tokens"] for judge in judges),
        "prompt_tokens_are": "at most" if sampled else "exact" if exact else "an estimate",
        "completion_tokens_at_most": sum(judge["completion_tokens_at_most"] for judge in judges),
        "judges": judges,
        "calls_per_s": rate,
        "seconds": pending.calls / rate if rate else None,
        "changes": changes(run.state(STAGE), facts(panel, path, {})),
        "protocol": panel.judges[0].protocol,
        "judge": ", ".join(judge.name for judge in panel.judges),
    }
    return found | _money(run, found, _sampling_dollars(run) if sampled else {})


def _of_judge(run: Run, judge: Judge, pending: PendingCalls, index: Index) -> dict[str, Any]:
    """What one judge is asked, and what that costs; `at_most` is with every call that the answers
    to others may call for."""
    missing, perhaps = pending.missing[judge.name], pending.conditional[judge.name]
    price = price_of(judge.model)
    with open_llm(judge.model) as llm:
        tokens = Tokens.of(llm, judge.asks(comparisons_of(run), missing, llm.control_tokens))
        cost = tokens.dollars(price)
        if perhaps:
            calls = (call for row in comparisons_of(run) for call in judge.calls_for(row))
            most = {call.digest for call in calls} - index.answered.keys()
            asks = judge.asks(comparisons_of(run), most, llm.control_tokens)
            cost["at_most"] = Tokens.of(llm, asks).dollars(price)["at_most"]
    return {
        "judge": judge.name,
        "calls": len(missing),
        "calls_perhaps": len(perhaps),
        "prompt_tokens": tokens.prompt,
        "prompt_tokens_are": "exact" if tokens.exact else "an estimate",
        "completion_tokens_at_most": tokens.completion_most,
        "price": judge.model.price,
        "dollars": cost,
    }


def _money(run: Run, found: dict[str, Any], sampling: dict[str, Any]) -> dict[str, Any]:
    """What is to be paid and what has been, in dollars, held against the budgets.

    Without any price nothing is said; a judge without one adds nothing, and is told beside it.
    """
    told = [judge["dollars"] for judge in found["judges"] if judge["price"] is not None]
    labels = {key: sum(cost[key] for cost in told) for key in ("about", "at_most")}
    whole = {key: labels[key] + sum(c[key] for c in sampling.values()) for key in labels}
    every = journals(run.root)
    paid = {path: spent_in(path, run.settings) for path in every}
    of_labels = sum(spent for path, spent in paid.items() if path.stem == LABELS)
    budgets = []
    for setting, dollars, cost, spent in (
        ("label.budget", run.settings.label.budget, labels, of_labels),
        ("pipeline.budget", run.settings.pipeline.budget, whole, sum(paid.values())),
    ):
        if dollars is not None:
            budgets.append({"setting": setting, "dollars": dollars, "spent": spent} | cost)
    return {
        "dollars": labels if told else {"about": None, "at_most": None},
        "dollars_of_sampling": sampling,
        "dollars_paid": of_labels,
        "budgets": budgets,
    }


def comparisons_of(run: Run) -> Iterator[Comparison]:
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
    texts = [f"{words}{number}" for number in range(samples_of(run))]
    for prompt in prompts_of(run):
        yield from pairs(run, prompt, texts)


def prompts_of(run: Run) -> list[Prompt]:
    """The prompts that the run samples responses to."""
    settings = run.settings.respond
    return list(islice(read_prompts(settings.prompts), settings.limit))


def samples_of(run: Run) -> int:
    """Of those responses to a prompt that are compared."""
    settings = run.settings.respond
    again = any(step.name == "resample" for step in steps(run))
    return (again and settings.resamples) or settings.samples


def _sampling(run: Run) -> dict[str, int]:
    """Calls of the stages of `aif run` that come before labels, at most."""
    settings = run.settings
    prompts = len(prompts_of(run))
    responses = prompts * settings.respond.samples
    revised = min(responses, settings.revise.limit or responses)
    each = {"respond": responses, "resample": prompts * samples_of(run)}
    each["revise"] = revised * settings.revise.rounds * 2
    return {step.name: each[step.name] for step in steps(run) if step.name in each}


def _sampling_dollars(run: Run) -> dict[str, dict[str, float | None]]:
    """What those of them cost whose model has a price (`resample` asks a model that was trained
    here, which has none)."""
    names = {step.name for step in steps(run)}
    found = {}
    for stage, model, asks in (
        ("respond", run.settings.policy, lambda llm: _samples_asked(run)),
        ("revise", model_of(run), lambda llm: _revisions_asked(run, llm)),
    ):
        if stage in names and model.price is not None:
            with open_llm(model) as llm:
                found[stage] = Tokens.of(llm, asks(llm)).dollars(price_of(model))
    return found


def _samples_asked(run: Run) -> Iterator[Ask]:
    shots = read_shots(run.settings.respond.shots)
    for prompt in prompts_of(run):
        yield from samples_for(run, prompt, shots)


def _revisions_asked(run: Run, llm: LLM) -> Iterator[Ask]:
    """The critiques and revisions of responses that are as long as they may be, and so are the
    critiques."""
    settings = run.settings
    reviser = reviser_of(run, llm)
    text = "word " * settings.policy.response_tokens
    critique = "word " * reviser.model.response_tokens
    responses = (
        (prompt, ask.key) for prompt in prompts_of(run) for ask in samples_for(run, prompt, [])
    )
    for prompt, response in islice(responses, settings.revise.limit):
        for number in range(1, settings.revise.rounds + 1):
            before = text if number == 1 else critique
            principle = reviser.principle(response, number)
            yield reviser.ask_critique(prompt.messages, before, principle)
            yield reviser.ask_revision(prompt.messages, before, principle, critique)
