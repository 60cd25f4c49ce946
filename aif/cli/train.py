"""`aif sft`, `aif reward`, `aif score` and `aif ppo`: the verbs that train and use models."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from aif.cli.options import (
    CONSTITUTION,
    JUDGE,
    Console,
    Flag,
    RunFolder,
    existing_run,
    parse_sources,
    seed,
    verb,
)
from aif.cli.render import counts

train_app = typer.Typer()

SOURCES = "SOURCE[=WEIGHT]"
START = "The model to start from; default: RUN/sft if it exists, else the policy."


@verb(
    train_app,
    Flag("--model", "sft.model", str, "The model to start from; default: the policy."),
    Flag(
        "--data", "sft.data", list[str],
        "What to learn from: revisions, votes, responses, a JSONL file or hf:NAME[:SPLIT]; "
        "repeatable. WEIGHT says how often an epoch shows each row.",
        SOURCES, parse_sources,
    ),
    seed("sft"),
)  # fmt: skip
def sft(run: RunFolder, settings: dict[str, Any], console: Console) -> None:
    """Fine-tune on revisions and demonstrations. Writes the model to RUN/sft.

    If it is stopped and started again, it ends with the same weights.
    """
    console.run_distributed("sft", existing_run(run, settings, unless="sft.data"), _sft_lines)


def _sft_lines(summary: dict[str, Any]) -> list[str]:
    """The examples that it learned from, and the loss on held-out ones."""
    lines = [f"{summary['examples']:,} examples, {_steps(summary)}"]
    lines += _too_long(summary, "examples")
    if summary["eval_loss"] is not None:
        lines.append(
            f"held out: loss {summary['eval_loss']:.3f}, perplexity {summary['perplexity']:.2f}"
        )
    if summary["eval_loss_before"] is not None:
        lines.append(f"held out before training: loss {summary['eval_loss_before']:.3f}")
    return [*lines, summary["model"]]


@verb(
    train_app,
    Flag("--model", "reward.model", str, START),
    Flag(
        "--data", "reward.data", list[str],
        "What to learn from: labels (the run's), a JSONL file of pairs with a choice or "
        "hf:NAME[:SPLIT]; repeatable. WEIGHT says how often an epoch shows each prompt.",
        SOURCES, parse_sources,
    ),
    seed("reward"),
)  # fmt: skip
def reward(run: RunFolder, settings: dict[str, Any], console: Console) -> None:
    """Train a reward model on the labels. Writes it to RUN/reward, with a report card.

    If it is stopped and started again, it ends with the same weights.
    """
    opened = existing_run(run, settings, unless="reward.data")
    console.run_distributed("reward", opened, _reward_lines)


def _reward_lines(summary: dict[str, Any]) -> list[str]:
    """The comparisons that it learned from, and the report card in brief."""
    lines = [
        f"{summary['pairs']:,} comparisons of {summary['prompts']:,} prompts, {_steps(summary)}"
    ]
    if summary["left_out"]:
        lines.append(f"left out: {counts(summary['left_out'])}")
    lines += _too_long(summary, "prompts")
    if summary["eval_loss"] is not None:
        before = summary["eval_loss_before"]
        lines.append(
            f"held out: {summary['eval_pairs']:,} comparisons, loss {summary['eval_loss']:.3f}"
            f"{f' (before training {before:.3f})' if before is not None else ''}"
        )
    return [*lines, *_card(summary["card"]), *summary["models"]]


def _steps(summary: dict[str, Any]) -> str:
    rate = summary["tokens_per_s"]
    return f"{summary['steps']:,} steps{f', {rate:,.0f} tokens/s' if rate else ''}"


def _too_long(summary: dict[str, Any], what: str) -> list[str]:
    if not (summary["truncated"] or summary["dropped"]):
        return []
    return [f"too long: {summary['truncated']:,} {what} cut, {summary['dropped']:,} left out"]


@verb(train_app)
def score(
    run: RunFolder,
    pairs: Annotated[str, typer.Option(help="The pairs to score: JSONL or hf:NAME[:SPLIT].")],
    settings: dict[str, Any],
    console: Console,
) -> None:
    """Score pairs with the reward model. Writes scores.jsonl, and says how often the scores agree
    with the choices in the file."""
    from aif.train.reward.score import score_file

    opened = existing_run(run, settings)
    with console.progress() as progress:
        summary = score_file(opened, progress, pairs)
    console.show(summary, _score_lines)


def _score_lines(summary: dict[str, Any]) -> list[str]:
    """How often the scores agree with the choices in the file."""
    lines = [f"{summary['pairs']:,} pairs scored"]
    if summary["too_long"]:
        lines[0] += f", {summary['too_long']:,} too long"
    return [*lines, *_card(summary), f"{summary['run']}/scores.jsonl"]


def _card(card: dict[str, Any]) -> list[str]:
    """Accuracies of a report card, a line each."""
    lines = []
    for kind, name in (("ai", "AI labels"), ("human", "people")):
        if kind in card:
            part = card[kind]
            lines.append(
                f"  {name:10} {_accuracy(part)}; longer wins {part['longer_wins']:.3f}, "
                f"calibration error {part['calibration']['ece']:.3f}"
            )
            if part.get("confident", {}).get("n"):
                lines.append(f"    confident {_accuracy(part['confident'])}")
    for name, part in card.get("by_principle", {}).items():
        lines += [f"    {name:10} {_accuracy(part)}"] if part["n"] else []
    return lines


def _accuracy(rate: dict[str, Any]) -> str:
    low, high = rate["interval"]
    return f"{rate['accuracy']:.3f} ({low:.3f} to {high:.3f}) of {rate['n']:,}"


@verb(
    train_app,
    Flag("--model", "ppo.model", str, START),
    Flag(
        "--prompts", "ppo.prompts", str,
        "The prompts: JSONL with `prompt`, or hf:NAME; default: the run's.",
    ),
    Flag(
        "--reward", "ppo.reward", list[str],
        "The reward: model (RUN/reward), judge (the run's, called live) or MODULE:FUNCTION; "
        "repeatable, summed by WEIGHT.",
        SOURCES, parse_sources,
    ),
    Flag("--gold", "ppo.gold", str, "A reward to measure, not to learn: judge or MODULE:FUNCTION."),
    CONSTITUTION,
    JUDGE,
    seed("ppo"),
)  # fmt: skip
def ppo(run: RunFolder, settings: dict[str, Any], console: Console) -> None:
    """Train the policy on a reward with PPO. Writes RUN/ppo, and the critic to RUN/ppo-critic.

    If it is stopped and started again, it ends with the same weights.
    """
    console.run_distributed("ppo", existing_run(run, settings, unless="ppo.prompts"), _ppo_lines)


def _ppo_lines(summary: dict[str, Any]) -> list[str]:
    """Scores and KL at the start and at the end, in training and on held-out prompts."""
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
