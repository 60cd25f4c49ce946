"""The comparisons, revisions and answers that the page lets a person look through.

Each text stands in `texts` once and is named by its number. An item is one comparison, one
response with its rounds of revision, or one prompt with the answers of every policy. What does not
fit into the budget is left out by a draw, and counted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from aif.report.judge_stats import Judged, page_size
from aif.report.schema import Evaluated, Sample, rows
from aif.run import Run
from aif.store.records import (
    Comparison,
    Kept,
    Message,
    Prompt,
    Response,
    Revision,
    Verdict,
    content_id,
)

KINDS = ("comparisons", "revisions", "answers")
Key = tuple[str, str]  # (kind, id)


class Texts:
    """Texts by number, each once."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._number: dict[str, int] = {}

    def number(self, text: str | None) -> int | None:
        """The number of a text, a new one if need be; None of None."""
        if text is None:
            return None
        if text not in self._number:
            self._number[text] = len(self.all)
            self.all.append(text)
        return self._number[text]

    def prompt(self, messages: Sequence[Message]) -> list[list[Any]]:
        """[[role, number of the text], ...]"""
        return [[m.get("role", ""), self.number(m.get("content", ""))] for m in messages]


def browsed(run: Run, judged: Judged, seed: int, budget: int) -> dict[str, Any]:
    """{"texts", "principles", and items by kind}, and under "counts" how many of how many.

    `budget` is in bytes, about."""
    sizes = _sizes(run, judged)
    kept = drawn(sizes, seed, budget)
    texts = Texts()
    principles = dict.fromkeys(name for row in judged.labels.values() for name in row.by_principle)
    made = {
        "comparisons": _comparisons(run, judged, kept, texts, list(principles)),
        "revisions": _revisions(run, kept, texts),
        "answers": _answers(run, kept, texts),
    }
    every = Counter(kind for kind, _ in sizes)
    return {
        "counts": {kind: [len(made[kind]), every[kind]] for kind in KINDS if every[kind]},
        "bytes": sum(sizes.values()),
        "texts": texts.all,
        "principles": list(principles),
        **made,
    }


def drawn(sizes: Counter[Key], seed: int, budget: int) -> set[Key]:
    """The items that fit, in an order that the seed and their ids alone decide."""
    if sizes.total() <= budget:
        return set(sizes)
    left, kept = budget, set()
    for key in sorted(sizes, key=lambda key: content_id("report", seed, *key)):
        if sizes[key] <= left:
            left -= sizes[key]
            kept.add(key)
    return kept


def _sizes(run: Run, judged: Judged) -> Counter[Key]:
    """About how many bytes each item takes."""
    sizes = Counter({("comparisons", name): 200 + judged.sizes[name] for name in judged.words})
    for row in rows(run, "revisions.jsonl", Revision):
        texts = (row.critique or "", row.revision or "")
        sizes["revisions", row.response_id] += 100 + sum(map(page_size, texts))
    for prompt_id, _, answer in _every_answer(run):
        sizes["answers", prompt_id] += 60 + page_size(answer["text"] or "")
    return sizes


def _comparisons(
    run: Run, judged: Judged, kept: set[Key], texts: Texts, principles: list[str]
) -> list[dict[str, Any]]:
    place = {name: number for number, name in enumerate(principles)}
    verdicts: dict[str, list[Any]] = defaultdict(list)
    for row in rows(run, "verdicts.jsonl", Verdict):
        if ("comparisons", row.comparison_id) in kept and row.principle_id in place:
            verdicts[row.comparison_id].append(
                [place[row.principle_id], row.order, _short(row.p_first), texts.number(row.text),
                 row.fault]
            )  # fmt: skip
    found = []
    for row in rows(run, "comparisons.jsonl", Comparison):
        if ("comparisons", row.id) in kept:
            label = judged.labels.get(row.id)
            found.append({
                "id": row.id,
                "prompt": texts.prompt(row.prompt),
                "first": texts.number(row.first),
                "second": texts.number(row.second),
                "labelled": label is not None,
                "p": _short(label.p_first) if label else None,
                "fault": label.fault if label else None,
                "by": [_short(label.by_principle.get(n)) for n in principles] if label else [],
                "human": judged.human.get(row.id),
                "verdicts": verdicts.get(row.id, []),
            })  # fmt: skip
    return found


def _short(p: float | None) -> float | None:
    """A probability as the page needs it. One that is not even stays so."""
    if p is None:
        return None
    rounded = round(p, 4)
    return p if rounded == 0.5 else rounded


def _revisions(run: Run, kept: set[Key], texts: Texts) -> list[dict[str, Any]]:
    chains: dict[str, list[Revision]] = defaultdict(list)
    for row in rows(run, "revisions.jsonl", Revision):
        if ("revisions", row.response_id) in kept:
            chains[row.response_id].append(row)
    if not chains:
        return []
    verdicts = {row.revision_id: row for row in rows(run, "kept.jsonl", Kept)}
    responses = {row.id: row.text for row in rows(run, "responses.jsonl", Response)
                 if row.id in chains}  # fmt: skip
    prompts = _prompts(run)
    return [
        {
            "id": name,
            "prompt": texts.prompt(prompts.get(chain[0].prompt_id, [])),
            "response": texts.number(responses.get(name)),
            "rounds": [
                {
                    "principle": row.principle_id,
                    "critique": texts.number(row.critique),
                    "revision": texts.number(row.revision),
                    "fault": row.fault,
                    "p": _short(verdicts[row.id].p_revision) if row.id in verdicts else None,
                    "kept": verdicts[row.id].kept if row.id in verdicts else None,
                }
                for row in sorted(chain, key=lambda row: row.round)
            ],
        }
        for name, chain in chains.items()
    ]


def _answers(run: Run, kept: set[Key], texts: Texts) -> list[dict[str, Any]]:
    prompts = _prompts(run)
    found: dict[str, list[Any]] = defaultdict(list)
    for prompt_id, messages, answer in _every_answer(run):
        if ("answers", prompt_id) in kept:
            if messages:
                prompts.setdefault(prompt_id, messages)
            found[prompt_id].append(answer | {"text": texts.number(answer["text"])})
    return [
        {"id": name, "prompt": texts.prompt(prompts.get(name, [])), "rows": answers}
        for name, answers in found.items()
    ]


def _prompts(run: Run) -> dict[str, list[Message]]:
    """The run's prompts, and those that its policies were evaluated on, by id."""
    evaluated = sorted(run.path.glob("evaluation/*/prompts.jsonl"))[:1]
    files = ["prompts.jsonl", *(str(path.relative_to(run.path)) for path in evaluated)]
    return {row.id: row.messages for file in files for row in rows(run, file, Prompt)}


def _every_answer(run: Run) -> Iterator[tuple[str, list[Message] | None, dict[str, Any]]]:
    """(prompt's id, its messages where the file has them, the answer) of every policy: sampled,
    sampled again after fine-tuning, at the first and the last look of PPO, in the evaluation."""
    for name, told in (("responses.jsonl", ""), ("resampled.jsonl", "after fine-tuning: ")):
        for row in rows(run, name, Response):
            policy = f"{told}{row.policy}, sample {row.sample}"
            yield row.prompt_id, None, _answer(policy, row.text, row.fault)
    steps = {row.step for row in rows(run, "ppo-samples.jsonl", Sample)}
    for row in rows(run, "ppo-samples.jsonl", Sample):
        if row.step in (min(steps), max(steps)):
            policy = f"PPO, step {row.step:,}"
            yield (
                row.prompt_id,
                row.prompt,
                _answer(policy, row.response, None, score=row.score, gold=row.gold, kl=row.kl),
            )
    for row in rows(run, "evaluation.jsonl", Evaluated):
        yield row.prompt_id, row.prompt, _answer(
            f"evaluated: {row.policy}", row.response, row.fault,
            score=row.score, gold=row.gold, kl=row.kl, refusal=row.refusal,
        )  # fmt: skip


def _answer(policy: str, text: str | None, fault: str | None, **told: Any) -> dict[str, Any]:
    told = {
        key: round(held, 4) if isinstance(held, float) else held
        for key, held in told.items()
        if held is not None
    }
    return {"policy": policy, "text": text, "fault": fault} | told
