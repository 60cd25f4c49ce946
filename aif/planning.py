"""The calls that a run would make, and their cost. It makes no call and writes nothing."""

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
from aif.judge.panel import panel_of
from aif.judge.provenance import changes, facts
from aif.llm import LLM, Ask, open_llm
from aif.llm.budget import LABELS, journals, most_tokens, price_of, spent_in
from aif.pipeline import steps
from aif.run import Run
from aif.stages.compare import pairs
from aif.stages.label import STAGE, comparisons, measured_rate, own_comparisons
from aif.stages.respond import read_few_shot, sample_asks
from aif.stages.revise import reviser_of
from aif.store.journal import Index
from aif.store.records import Comparison, Prompt


@dataclass(frozen=True, slots=True)
class CallTokens:
    """The tokens of some calls."""

    prompt: int
    exact: bool  # whether a tokenizer counted them; else it is an estimate
    prompt_most: int  # an upper bound
    completion_most: int

    @classmethod
    def of(cls, llm: LLM, asks: Iterable[Ask]) -> CallTokens:
        prompt = most = completion = 0
        exact = True
        for ask in asks:
            tokens, exact = llm.count_tokens([ask])
            prompt += tokens
            most += tokens if exact else most_tokens(ask)
            completion += ask.max_tokens * ask.samples
        return cls(prompt, exact, most, completion)

    def dollars(self, price: Price | None) -> dict[str, float | None]:
        """An estimate of the cost and an upper bound. Both count answers at their full length."""
        if price is None:
            return {"about": None, "at_most": None}
        return {
            "about": price.cost(self.prompt, self.completion_most),
            "at_most": price.cost(self.prompt_most, self.completion_most),
        }


def plan(run: Run, rate: float | None = None) -> dict[str, Any]:
    """The calls of `aif label` with these settings, and of the stages before it in `aif run`.

    If the responses are not sampled yet, it takes the most and the longest that the settings allow;
    calls and tokens are then upper bounds. `rate` is calls per second; None: the rate of the last
    labelling by the same judges. Raises InputError for a budget without a price.
    """
    check_models(run, STAGE, [run.settings.judge, *run.settings.panel])
    panel = panel_of(run.settings)
    sampled = _is_to_be_sampled(run)
    with run.answers(STAGE, missing_ok=True) as journal:
        pending = PendingCalls.of(panel, comparisons_of(run), journal)
        judges = [_of_judge(run, judge, pending, journal.index) for judge in panel.judges]
    principles = Counter(name for calls in pending.missing.values() for name in calls.values())
    used = facts(panel, run.settings, {})
    rate = rate or measured_rate(run, used)
    exact = all(judge["prompt_tokens_are"] == "exact" for judge in judges)
    summary = {
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
        "changes": changes(run.state(STAGE), used),
        "protocol": panel.judges[0].protocol,
        "judge": ", ".join(judge.name for judge in panel.judges),
    }
    return summary | _dollars(run, judges, _sampling_dollars(run) if sampled else {})


def _of_judge(run: Run, judge: Judge, pending: PendingCalls, index: Index) -> dict[str, Any]:
    """The calls of one judge and their cost; `at_most` includes the calls that other answers may
    make necessary."""
    missing, perhaps = pending.missing[judge.name], pending.conditional[judge.name]
    price = price_of(judge.model)
    with open_llm(judge.model) as llm:
        tokens = CallTokens.of(llm, judge.asks(comparisons_of(run), missing, llm.control_tokens))
        cost = tokens.dollars(price)
        if perhaps:
            calls = (call for row in comparisons_of(run) for call in judge.calls_for(row))
            most = {call.digest for call in calls} - index.answered.keys()
            asks = judge.asks(comparisons_of(run), most, llm.control_tokens)
            cost["at_most"] = CallTokens.of(llm, asks).dollars(price)["at_most"]
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


def _dollars(run: Run, judges: list[dict[str, Any]], sampling: dict[str, Any]) -> dict[str, Any]:
    """The dollars to pay, the dollars paid, and the budgets. A judge without a price adds
    nothing."""
    priced = [judge["dollars"] for judge in judges if judge["price"] is not None]
    labels = {key: sum(cost[key] for cost in priced) for key in ("about", "at_most")}
    whole = {key: labels[key] + sum(c[key] for c in sampling.values()) for key in labels}
    paid = {path: spent_in(path, run.settings) for path in journals(run.root)}
    of_labels = sum(spent for path, spent in paid.items() if path.stem == LABELS)
    budgets = []
    for setting, dollars, cost, spent in (
        ("label.budget", run.settings.label.budget, labels, of_labels),
        ("pipeline.budget", run.settings.pipeline.budget, whole, sum(paid.values())),
    ):
        if dollars is not None:
            budgets.append({"setting": setting, "dollars": dollars, "spent": spent} | cost)
    return {
        "dollars": labels if priced else {"about": None, "at_most": None},
        "dollars_of_sampling": sampling,
        "dollars_paid": of_labels,
        "budgets": budgets,
    }


def comparisons_of(run: Run) -> Iterator[Comparison]:
    """The comparisons that `aif label` will judge after the stages before it."""
    label = run.settings.label
    if label.pairs is not None:
        rows = unique(islice(read_pairs(label.pairs), label.limit))
        return (pair.comparison for pair, is_new in rows if is_new)
    if _is_to_be_sampled(run):
        return islice(_expected(run), label.limit)
    own_comparisons(run)
    return comparisons(run)


def _is_to_be_sampled(run: Run) -> bool:
    settings = run.settings
    has_pairs = settings.label.pairs is not None or run.file("comparisons.jsonl").exists()
    return not has_pairs and settings.respond.prompts is not None


def _expected(run: Run) -> Iterator[Comparison]:
    """Comparisons of responses that are as long as the settings allow."""
    words = " word" * run.settings.policy.response_tokens
    texts = [f"{number}{words}" for number in range(samples_of(run))]
    for prompt in prompts_of(run):
        yield from pairs(run, prompt, texts)


def prompts_of(run: Run) -> list[Prompt]:
    """The prompts that the run samples responses to."""
    settings = run.settings.respond
    return list(islice(read_prompts(settings.prompts), settings.limit))


def samples_of(run: Run) -> int:
    """The number of responses to a prompt that are compared."""
    settings = run.settings.respond
    again = any(step.name == "resample" for step in steps(run))
    return (again and settings.sft_samples) or settings.samples


def _sampling(run: Run) -> dict[str, int]:
    """An upper bound of the calls of the stages before labels, by stage."""
    settings = run.settings
    prompts = len(prompts_of(run))
    responses = prompts * settings.respond.samples
    revised = min(responses, settings.revise.limit or responses)
    each = {"respond": responses, "resample": prompts * samples_of(run)}
    each["revise"] = revised * settings.revise.rounds * 2
    return {step.name: each[step.name] for step in steps(run) if step.name in each}


def _sampling_dollars(run: Run) -> dict[str, dict[str, float | None]]:
    """The cost of these calls, if their model has a price. (`resample` asks a model that was
    trained here, which has none.)"""
    names = {step.name for step in steps(run)}
    costs = {}
    for stage, model, asks in (
        ("respond", run.settings.policy, lambda llm: _samples_asked(run)),
        ("revise", run.settings.reviser_model, lambda llm: _revisions_asked(run, llm)),
    ):
        if stage in names and model.price is not None:
            with open_llm(model) as llm:
                costs[stage] = CallTokens.of(llm, asks(llm)).dollars(price_of(model))
    return costs


def _samples_asked(run: Run) -> Iterator[Ask]:
    few_shot = read_few_shot(run.settings.respond.few_shot)
    for prompt in prompts_of(run):
        yield from sample_asks(run.settings, prompt, few_shot)


def _revisions_asked(run: Run, llm: LLM) -> Iterator[Ask]:
    """The calls for critiques and revisions, if every text is as long as the settings allow."""
    settings = run.settings
    reviser = reviser_of(run, llm)
    text = "word " * settings.policy.response_tokens
    critique = "word " * reviser.model.response_tokens
    responses = (
        (prompt, ask.key)
        for prompt in prompts_of(run)
        for ask in sample_asks(run.settings, prompt, [])
    )
    for prompt, response in islice(responses, settings.revise.limit):
        for number in range(1, settings.revise.rounds + 1):
            before = text if number == 1 else critique
            principle = reviser.principle(response, number)
            yield reviser.ask_critique(prompt.messages, before, principle)
            yield reviser.ask_revision(prompt.messages, before, principle, critique)
