"""A run folder with a file of every stage, made up from a seed: what a report is made of."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from aif.config.settings import Settings
from aif.config.toml import checked
from aif.constitution.file import Constitution, load
from aif.judge.aggregate import aggregate_verdicts
from aif.run import Run
from aif.stats.calibration import moments
from aif.stats.odds import probability
from aif.store.journal import Journal
from aif.store.records import (
    Comparison,
    HumanChoice,
    Kept,
    Label,
    Prompt,
    Response,
    Revision,
    Verdict,
    content_id,
)
from aif.train.reward.card import ScoredPair, report_card
from tests.conftest import write_constitution, write_jsonl

WORDS = ("the", "warm", "answer", "listens", "first", "then", "says", "one", "useful", "thing")
QUESTIONS = {"kind": "Which response is kinder?", "honest": "Which response is more honest?"}
FAULTY = 7  # every so many verdicts have no answer


def labelled_run(
    path: Path, comparisons: int = 60, texts: Iterable[str] = (), words: int = 30
) -> Run:
    """Responses of at most so many words, comparisons, verdicts and labels. `texts` stand among the
    responses, whatever is in them."""
    path.mkdir(parents=True, exist_ok=True)
    write_constitution(path / "mine.toml", QUESTIONS)
    tables = {"label": {"constitution": str(path / "mine.toml"), "protocol": "pairwise"}}
    run = Run(path, checked(Settings, tables, "test"))
    run.keep_settings()
    draw = random.Random(0)
    prompts = [Prompt.of([{"role": "user", "content": f"Question {n}: {sentence(draw)}?"}])
               for n in range(max(2, comparisons // 3))]  # fmt: skip
    left = list(texts)
    responses = [
        Response(content_id("r", p.id, n), p.id, "tiny", n,
                 left.pop() if left else sentence(draw, words), "stop", None,
                 {"prompt_tokens": 9})
        for p in prompts for n in range(3)
    ]  # fmt: skip
    assert not left, "too few responses for all the texts"
    fault = Response(content_id("empty"), prompts[0].id, "tiny", 3, None, None, "empty", {})
    run.write("prompts.jsonl", prompts)
    run.write("responses.jsonl", [*responses, fault])
    pairs = [
        Comparison.of(p.messages, a.text or "", b.text or "")
        for p, own in zip(prompts, zip(*[iter(responses)] * 3, strict=True), strict=True)
        for a, b in ((own[0], own[1]), (own[0], own[2]), (own[1], own[2]))
    ][:comparisons]
    run.write("comparisons.jsonl", pairs)
    run.write("human.jsonl", [HumanChoice(c.id, draw.choice((0.0, 1.0))) for c in pairs[::2]])
    _judge(run, pairs, load(path / "mine.toml"), draw)
    return run


def sentence(draw: random.Random, most: int = 30) -> str:
    """A few words."""
    return " ".join(draw.choices(WORDS, k=draw.randint(4, most)))


def _judge(run: Run, pairs: list[Comparison], constitution: Constitution, draw: Any) -> None:
    verdicts, labels = [], []
    for number, pair in enumerate(pairs):
        own = list(_verdicts(pair, constitution, draw, faulty=number % FAULTY == 0))
        verdicts += own
        labels.append(aggregate_verdicts(pair, own, constitution, "pairwise"))
    labels[1] = replace(labels[1], p_first=0.7)  # on the border of what is confident
    run.write("verdicts.jsonl", verdicts)
    run.write("labels.jsonl", labels)
    run.write_state(
        "label",
        {
            "judge": {"model": "openai:test", "temperature": 0.0, "samples": 1},
            "protocol": "pairwise",
            "draw": "all principles",
            "hard_verdicts": 0,
            "constitution": {
                "file": str(run.path / "mine.toml"),
                "name": constitution.name,
                "digest": constitution.digest(),
                "principles": {p.id: p.digest("pairwise", "chat") for p in constitution.principle},
            },
        },
    )
    _paid(run.file("journal") / "label.jsonl", verdicts[:50])


def _paid(path: Path, verdicts: Iterable[Verdict]) -> None:
    with Journal.open(path) as journal:
        for verdict in verdicts:
            journal.append({"id": verdict.id, "fault": verdict.fault})


def _verdicts(
    pair: Comparison, constitution: Constitution, draw: random.Random, faulty: bool
) -> Iterator[Verdict]:
    lean = 0.5 * (len(pair.first) > len(pair.second)) + draw.gauss(0, 1)
    for principle in constitution.principle:
        for order in ("ab", "ba"):
            p = probability(lean + draw.gauss(0, 0.8) + (0.4 if order == "ab" else -0.4))
            fault = "unparsed" if faulty and principle.id == "honest" and order == "ba" else None
            yield Verdict(
                content_id(pair.id, principle.id, order), pair.id, principle.id, order,
                "openai:test", None if fault else f"I weigh both. {'A' if p > 0.5 else 'B'}",
                None if fault else p, fault, {"prompt_tokens": 100, "completion_tokens": 1},
            )  # fmt: skip


def full_run(path: Path, comparisons: int = 60, texts: Iterable[str] = ()) -> Run:
    """A labelled run that was also revised, trained and evaluated."""
    run = labelled_run(path, comparisons, texts)
    responses = [row for row in run.read("responses.jsonl", Response) if row.text]
    _revise(run, responses[:12])
    labels = list(run.read("labels.jsonl", Label))
    run.write_state("reward-card", _card(labels))
    run.write_state("sft", {"from": "tiny", "examples": 20, "steps": 8, "eval_loss": 1.2})
    run.write_state("reward", {"from": "tiny", "pairs": 40, "eval_pairs": 12, "steps": 8})
    run.write_state(
        "ppo", {"from": "tiny", "algorithm": "ppo", "prompts": 9, "steps": 30, "eval_prompts": 5}
    )
    write_jsonl(path / "metrics.jsonl", _metrics())
    prompts = {row.id: row.messages for row in run.read("prompts.jsonl", Prompt)}
    held_out = list(prompts)[:5]
    write_jsonl(path / "ppo-samples.jsonl", (
        {"step": step, "prompt_id": name, "prompt": prompts[name],
         "response": f"an answer at step {step}", "score": step / 10, "gold": None if step else 0.5,
         "kl": 0.2 * step, "tokens": 5, "ended": True}
        for step in (0, 10, 30) for name in held_out
    ))  # fmt: skip
    write_jsonl(path / "evaluation.jsonl", (
        {"policy": policy, "prompt_id": name, "response": None if name == held_out[0] else
         f"{policy} answers", "score": 0.1, "gold": 0.2, "kl": 1.0, "words": 2, "refusal": False}
        for policy in ("base", "ppo") for name in held_out
    ))  # fmt: skip
    run.write_state("evaluate", EVALUATION)
    verdicts = list(run.read("verdicts.jsonl", Verdict))
    _paid(path / "evaluation" / "matches" / "journal" / "label.jsonl", verdicts[1:4])
    return run


def _revise(run: Run, responses: list[Response]) -> None:
    rows = [
        Revision(content_id("v", row.id, n), row.id, row.prompt_id, n, "kind", "tiny",
                 "It is cold.", None if n == 2 else f"A warmer answer: {row.text}",
                 "truncated" if n == 2 else None, {})
        for row in responses for n in (1, 2)
    ]  # fmt: skip
    run.write("revisions.jsonl", rows)
    run.write("kept.jsonl", [
        Kept(row.id, row.response_id, 1, content_id("c", row.id), 0.25 + 0.5 * (n % 2), {}, None,
             bool(n % 2))
        for n, row in enumerate(rows) if row.round == 1
    ])  # fmt: skip


def _card(labels: list[Label]) -> dict[str, Any]:
    draw = random.Random(1)
    pairs = [
        ScoredPair(label.comparison_id, "p", draw.gauss((label.p_first - 0.5) * 4, 1), 0.0,
                   draw.randint(3, 30), draw.randint(3, 30), label.p_first, label.by_principle,
                   float(draw.random() > 0.5))
        for label in labels if label.p_first is not None
    ]  # fmt: skip
    card = report_card(pairs)
    scores = [pair.score_first for pair in pairs]
    curve = [{"pairs": n, "accuracy": 0.6 + n / 400, "interval": [0.5, 0.9]} for n in (10, 20, 40)]
    return card | {
        "scores": {"held out": moments(scores), "policy": moments(scores)},
        "curve": curve,
    }


def _metrics() -> Iterator[dict[str, Any]]:
    def row(stage: str, step: int, name: str, value: float | None) -> dict[str, Any]:
        return {"stage": stage, "step": step, "name": name, "value": value}

    for stage in ("sft", "reward"):
        for step in range(1, 9):
            yield row(stage, step, "loss", 2 / step)
        for step in (0, 8):
            yield row(stage, step, "eval_loss", 2.5 - step / 8)
    for step in range(1, 31):
        for name, value in (
            ("objective/scores", 0.1 * step), ("objective/kl", 0.2 * step),
            ("policy/entropy_avg", 2 - step / 30), ("policy/clipfrac_avg", 0.1),
            ("val/explained_variance", None if step == 3 else 1 - 1 / step),
            ("val/eos_rate", 0.9), ("val/response_length", 20 + step), ("episode", 8 * step),
        ):  # fmt: skip
            yield row("ppo", step, name, value)
    for step in range(0, 31, 10):
        yield row("ppo", step, "eval/scores", 0.1 * step)
        yield row("ppo", step, "eval/gold", 0.5 + math.sin(step / 9))
        yield row("ppo", step, "eval/kl", 0.2 * step)


def _near(mean: float, off: float = 0.08) -> dict[str, Any]:
    return {"mean": mean, "low": mean - off, "high": mean + off, "n": 40}


EVALUATION = {
    "run": "full",
    "judge": "openai:test",
    "protocol": "pairwise",
    "prompts": 40,
    "against": "base",
    "seed": 3,
    "policies": [
        {"name": "base", "model": "tiny", "responses": 40, "faults": {}, "gold": _near(0.5),
         "score": _near(0.0), "kl": {"mean": 0.0}, "words": _near(20, 2), "distinct_1": 0.4,
         "distinct_2": 0.8, "self_bleu": 0.2, "refusal_rate": {"mean": 0.05}, "rating": _near(0.4)},
        {"name": "best of 4", "model": "tiny", "responses": 40, "gold": _near(0.9),
         "score": _near(1.0), "kl": {"mean": math.log(4) - 0.75, "bound": True}},
        {"name": "ppo", "model": "/home/jane/secret/run/ppo", "responses": 39,
         "faults": {"truncated": 1}, "words": _near(31, 2), "gold": _near(1.1),
         "score": _near(2.8), "kl": _near(6.0),
         "rating": _near(0.7), "refusal_rate": 0.1},
    ],
    "matches": [
        {"first": "best of 4", "second": "base", "n": 40, "wins": 22, "ties": 4, "losses": 14,
         "null": 0, "win_rate": _near(0.6)},
        {"first": "ppo", "second": "base", "n": 39, "wins": 26, "ties": 2, "losses": 11,
         "null": 1, "win_rate": _near(0.692), "soft_win_rate": _near(0.66),
         "length_controlled": _near(0.61), "by_principle": {"kind": 0.7, "honest": None}},
    ],
    "human": {"pairs": 30, "judge": _near(0.7), "reward": None},
}  # fmt: skip
