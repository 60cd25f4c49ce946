"""What a verb tells a person of its summary: a list of lines each."""

from __future__ import annotations

from typing import Any

from aif.config.price import dollars
from aif.progress import duration
from aif.store.records import FAULTS


def label(summary: dict[str, Any]) -> list[str]:
    """Labels, calls and faults."""
    null = sum(summary["labels_null"].values())
    lines = [
        f"{summary['labels']:,} labels ({null:,} null), {summary['calls_made']:,} calls made, "
        f"{summary['calls_kept']:,} kept, {sum(summary['faults'].values()):,} faults"
    ]
    if summary.get("cost"):
        lines.append(f"{dollars(summary['cost'])} for these calls")
    for name, found in summary.get("judges", {}).items():
        lines.append(f"  {name}: {found.get('labels', 0):,} labels ({found.get('null', 0):,} null)")
    for fault in ("tied", "no_consensus"):
        if number := summary["labels_null"].get(fault):
            lines.append(f"{number:,} labels are null as {FAULTS[fault]}")
    if more := summary.get("escalated"):
        saved = 1 - more["calls"] / max(1, more["calls_of_all"])
        lines.append(
            f"{more['comparisons']:,} comparisons got more than the cheap pass: {more['calls']:,} "
            f"calls of the {more['calls_of_all']:,} that all would take ({saved:.0%} saved)"
        )
    if summary["hard_verdicts"]:
        lines.append(
            f"{summary['hard_verdicts']:,} verdicts are parsed text, not log-probabilities: "
            "their labels are coarse (judge.samples = n makes them finer)"
        )
    if summary["data"].get("repeated_rows"):
        lines.append(
            f"{summary['data']['repeated_rows']:,} rows repeat another and share its label"
        )
    return [*lines, f"{summary['run']}/labels.jsonl"]


def plan(plan: dict[str, Any]) -> list[str]:
    """What a labelling would cost."""
    lines = [f"{name}: {n:,} calls at most" for name, n in plan["sampling"].items()]
    lines += [
        f"{plan['comparisons']:,} comparisons, {plan['protocol']} by {plan['judge']}",
        f"{plan['calls']:,} calls to make, {plan['calls_kept']:,} answers kept, "
        f"{plan['answers_unused']:,} no longer used",
        f"{plan['prompt_tokens']:,} prompt tokens ({plan['prompt_tokens_are']}), "
        f"at most {plan['completion_tokens_at_most']:,} to generate",
    ]
    if plan["calls_perhaps"]:
        lines.insert(-1, f"  and {plan['calls_perhaps']:,} more at most, as answers call for them")
    lines += [f"  {name}: {n:,} calls" for name, n in plan["calls_by_principle"].items()]
    if len(plan["judges"]) > 1:
        lines += [f"  {judge['judge']}: {judge['calls']:,} calls" for judge in plan["judges"]]
    if plan["seconds"] is not None:
        rate = plan["calls_per_s"]
        lines.append(f"about {duration(plan['seconds'])} at {rate:,.3g} calls a second")
    return [*plan["changes"], *lines, *_prices(plan)]


def _prices(plan: dict[str, Any]) -> list[str]:
    """What there is to pay, what has been paid, and how far the budgets go."""
    lines = [
        f"{stage}: {dollars(cost['at_most'])} at most"
        for stage, cost in plan["dollars_of_sampling"].items()
    ]
    cost = plan["dollars"]
    if cost["at_most"] is not None:
        about, most = dollars(cost["about"]), dollars(cost["at_most"])
        about = f"{about} at most" if about == most else f"about {about}, {most} at most"
        lines.append(f"to pay: {about}; paid: {dollars(plan['dollars_paid'])}")
        unpriced = [judge["judge"] for judge in plan["judges"] if judge["price"] is None]
        lines += [f"  without {', '.join(unpriced)}, whose price is not known"] if unpriced else []
    elif plan["dollars_paid"]:
        lines.append(f"paid: {dollars(plan['dollars_paid'])}")
    return lines + [_covered(budget) for budget in plan["budgets"]]


def _covered(budget: dict[str, Any]) -> str:
    left = max(0.0, budget["dollars"] - budget["spent"])
    if left >= budget["at_most"]:
        goes = "covers all of it"
    elif left >= budget["about"]:
        goes = "is likely to cover it"
    else:
        goes = f"covers about {left / budget['about']:.0%} of it"
    spent = f", {dollars(budget['spent'])} of it spent" if budget["spent"] else ""
    return f"the budget of {dollars(budget['dollars'])} ({budget['setting']}{spent}) {goes}"


def respond(summary: dict[str, Any]) -> list[str]:
    """Responses and calls."""
    faults = sum(summary["faults"].values())
    return [
        f"{summary['responses']:,} responses to {summary['prompts']:,} prompts "
        f"({faults:,} faults), {summary['calls_made']:,} calls",
        f"{summary['run']}/{summary['file']}",
    ]


def revise(summary: dict[str, Any]) -> list[str]:
    """Good revisions by round, and what became of the others."""
    by_round = ", ".join(f"{n:,}" for n in summary["revisions_by_round"])
    faults = ", ".join(f"{n:,} {kind}" for kind, n in summary["revision_faults"].items())
    lines = [
        f"{summary['revisions']:,} revisions of {summary['responses']:,} responses "
        f"(by round: {by_round}), {summary['calls_made']:,} calls made, "
        f"{summary['calls_kept']:,} kept"
    ]
    lines += [f"rounds that left the text as it was: {faults}"] if faults else []
    if summary["unfinished"]:
        lines.append(f"{summary['unfinished']:,} responses wait for calls that failed")
    return [*lines, f"{summary['run']}/revisions.jsonl"]


def filter(summary: dict[str, Any]) -> list[str]:
    """What was kept, by round."""
    lines = [
        f"{summary['kept']:,} of {summary['revisions']:,} revisions kept "
        f"({summary['kept_rate']:.0%}), {summary['calls_made']:,} calls made, "
        f"{summary['calls_kept']:,} kept"
    ]
    for number, found in summary["by_round"].items():
        mean = found["mean_p_revision"]
        told = "" if mean is None else f", mean probability of being better {mean:.2f}"
        lines.append(f"  round {number}: {found['kept_rate']:.0%} kept{told}")
    return [*lines, f"{summary['run']}/kept.jsonl"]


def vote(summary: dict[str, Any]) -> list[str]:
    """Votes, and how often they are right where that is known."""
    faults = ", ".join(f"{n:,} {kind}" for kind, n in summary["faults"].items())
    lines = [
        f"{summary['votes']:,} votes on {summary['prompts']:,} prompts"
        f"{f' (none: {faults})' if faults else ''}, {summary['responses_kept']:,} responses kept"
    ]
    if summary.get("prompts_with_gold"):
        lines.append(
            f"right, where the answer is known: {summary['accuracy_vote']:.1%} of votes, "
            f"{summary['accuracy_single']:.1%} of single responses"
        )
    return [*lines, f"{summary['run']}/votes.jsonl"]


def sft(summary: dict[str, Any]) -> list[str]:
    """What was learned from, and the loss on what was not."""
    rate = summary["tokens_per_s"]
    lines = [
        f"{summary['examples']:,} examples, {summary['steps']:,} steps"
        f"{f', {rate:,.0f} tokens/s' if rate else ''}"
    ]
    if summary["truncated"] or summary["dropped"]:
        lines.append(
            f"too long: {summary['truncated']:,} examples cut, {summary['dropped']:,} left out"
        )
    if summary["eval_loss"] is not None:
        lines.append(
            f"held out: loss {summary['eval_loss']:.3f}, perplexity {summary['perplexity']:.2f}"
        )
    if summary["eval_loss_before"] is not None:
        lines.append(f"held out before training: loss {summary['eval_loss_before']:.3f}")
    return [*lines, summary["model"]]


def reward(summary: dict[str, Any]) -> list[str]:
    """What was learned from, and the report card in brief."""
    rate = summary["tokens_per_s"]
    lines = [
        f"{summary['pairs']:,} comparisons of {summary['prompts']:,} prompts, "
        f"{summary['steps']:,} steps{f', {rate:,.0f} tokens/s' if rate else ''}"
    ]
    if summary["left_out"]:
        left = ", ".join(f"{n:,} {why}" for why, n in summary["left_out"].items())
        lines.append(f"left out: {left}")
    if summary["truncated"] or summary["dropped"]:
        lines.append(
            f"too long: {summary['truncated']:,} prompts cut, {summary['dropped']:,} left out"
        )
    if summary["eval_loss"] is not None:
        before = summary["eval_loss_before"]
        lines.append(
            f"held out: {summary['eval_pairs']:,} comparisons, loss {summary['eval_loss']:.3f}"
            f"{f' (before training {before:.3f})' if before is not None else ''}"
        )
    return [*lines, *_card(summary["card"]), *summary["models"]]


def ppo(summary: dict[str, Any]) -> list[str]:
    """Where the policy stood and stands, on what it learned from and on what it did not."""
    first, last = summary["first"], summary["last"]
    lines = [
        f"{summary['steps']:,} steps of {summary['algorithm']} on {summary['prompts']:,} prompts: "
        f"score {first['objective/scores']:.3f} -> {last['objective/scores']:.3f}, "
        f"KL {last['objective/kl']:.2f}, response length {last['val/response_length']:.0f} tokens"
    ]
    if summary["dropped"]:
        lines.append(f"too long: {summary['dropped']:,} prompts left out")
    before, after = summary["eval_before"], summary["eval_after"]
    for name in ("scores", "gold") if before else ():
        if (key := f"eval/{name}") in after:
            lines.append(
                f"held out, {name}: {before[key]:.3f} -> {after[key]:.3f} at KL "
                f"{after['eval/kl']:.2f} ({summary['eval_prompts']:,} prompts)"
            )
    if summary["best_step"] is not None:
        lines.append(f"ends with the weights of step {summary['best_step']:,}, its highest gold")
    if summary.get("judge_calls"):
        lines.append(f"{summary['judge_calls']:,} calls of the judge")
    return [*lines, summary["model"]]


def score(summary: dict[str, Any]) -> list[str]:
    """How often the scores agree with what the file says."""
    lines = [f"{summary['pairs']:,} pairs scored"]
    if summary["too_long"]:
        lines[0] += f", {summary['too_long']:,} too long"
    return [*lines, *_card(summary), f"{summary['run']}/scores.jsonl"]


def _card(card: dict[str, Any]) -> list[str]:
    """Accuracies of a report card, a line each."""
    lines = []
    for kind, name in (("ai", "AI labels"), ("human", "people")):
        if kind in card:
            found = card[kind]
            lines.append(
                f"  {name:10} {_rate(found)}; longer wins {found['longer_wins']:.3f}, "
                f"calibration error {found['calibration']['ece']:.3f}"
            )
            if found.get("confident", {}).get("n"):
                lines.append(f"    confident {_rate(found['confident'])}")
    for name, found in card.get("by_principle", {}).items():
        lines += [f"    {name:10} {_rate(found)}"] if found["n"] else []
    return lines


def _rate(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['accuracy']:.3f} ({low:.3f} to {high:.3f}) of {found['n']:,}"
