"""The comparisons, revisions and answers that a person can look through on the page.

Each text stands in `texts` once and has a number. An item is one comparison, one response with its
rounds of revision, or one prompt with the answers of every policy. If they do not all fit into the
budget, a random draw leaves some out and counts them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from aif.evaluation.schema import Evaluated
from aif.report.judge_stats import LabelSurvey, page_size
from aif.report.schema import Sample, rows
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


def browser_data(run: Run, labels: LabelSurvey, seed: int, budget: int) -> dict[str, Any]:
    """{"texts", "principles", and items by kind}, and under "counts" how many of how many.

    `budget` is in bytes, about."""
    sizes = _sizes(run, labels)
    kept = draw(sizes, seed, budget)
    texts = Texts()
    principles = dict.fromkeys(name for row in labels.labels.values() for name in row.by_principle)
    items = {
        "comparisons": _comparisons(run, labels, kept, texts, list(principles)),
        "revisions": _revisions(run, kept, texts),
        "answers": _answers(run, kept, texts),
    }
    every = Counter(kind for kind, _ in sizes)
    return {
        "counts": {kind: [len(items[kind]), every[kind]] for kind in KINDS if every[kind]},
        "bytes": sum(sizes.values()),
        "texts": texts.all,
        "principles": list(principles),
        **items,
    }


def draw(sizes: Counter[Key], seed: int, budget: int) -> set[Key]:
    """The items that fit, in a random order by the seed and their ids alone."""
    if sizes.total() <= budget:
        return set(sizes)
    left, kept = budget, set()
    for key in sorted(sizes, key=lambda key: content_id("report", seed, *key)):
        if sizes[key] <= left:
            left -= sizes[key]
            kept.add(key)
    return kept


def _sizes(run: Run, labels: LabelSurvey) -> Counter[Key]:
    """About how many bytes each item takes."""
    sizes = Counter({("comparisons", name): 200 + labels.sizes[name] for name in labels.words})
    for row in rows(run, "revisions.jsonl", Revision):
        texts = (row.critique or "", row.revision or "")
        sizes["revisions", row.response_id] += 100 + sum(map(page_size, texts))
    for prompt_id, _, answer in _every_answer(run):
        sizes["answers", prompt_id] += 60 + page_size(answer["text"] or "")
    return sizes


def _comparisons(
    run: Run, labels: LabelSurvey, kept: set[Key], texts: Texts, principles: list[str]
) -> list[dict[str, Any]]:
    place = {name: number for number, name in enumerate(principles)}
    verdicts: dict[str, list[Any]] = defaultdict(list)
    for row in rows(run, "verdicts.jsonl", Verdict):
        if ("comparisons", row.comparison_id) in kept and row.principle_id in place:
            verdicts[row.comparison_id].append(
                [place[row.principle_id], row.order, _short(row.p_first), texts.number(row.text),
                 row.fault]
            )  # fmt: skip
    items = []
    for row in rows(run, "comparisons.jsonl", Comparison):
        if ("comparisons", row.id) in kept:
            label = labels.labels.get(row.id)
            items.append({
                "id": row.id,
                "prompt": texts.prompt(row.prompt),
                "first": texts.number(row.first),
                "second": texts.number(row.second),
                "labelled": label is not None,
                "p": _short(label.p_first) if label else None,
                "fault": label.fault if label else None,
                "by": [_short(label.by_principle.get(n)) for n in principles] if label else [],
                "human": labels.human.get(row.id),
                "verdicts": verdicts.get(row.id, []),
            })  # fmt: skip
    return items


def _short(p: float | None) -> float | None:
    """A probability with four digits. One that is not a tie does not become one."""
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
    by_prompt: dict[str, list[Any]] = defaultdict(list)
    for prompt_id, messages, answer in _every_answer(run):
        if ("answers", prompt_id) in kept:
            if messages:
                prompts.setdefault(prompt_id, messages)
            by_prompt[prompt_id].append(answer | {"text": texts.number(answer["text"])})
    return [
        {"id": name, "prompt": texts.prompt(prompts.get(name, [])), "rows": answers}
        for name, answers in by_prompt.items()
    ]


def _prompts(run: Run) -> dict[str, list[Message]]:
    """The run's prompts and the prompts of its evaluation, by id."""
    evaluated = sorted(run.path.glob("evaluation/*/prompts.jsonl"))[:1]
    files = ["prompts.jsonl", *(str(path.relative_to(run.path)) for path in evaluated)]
    return {row.id: row.messages for file in files for row in rows(run, file, Prompt)}


def _every_answer(run: Run) -> Iterator[tuple[str, list[Message] | None, dict[str, Any]]]:
    """(prompt's id, its messages if the file has them, the answer) of every policy: sampled,
    sampled again after fine-tuning, at the first and last evaluation of PPO, and evaluated."""
    for name, when in (("responses.jsonl", ""), ("resampled.jsonl", "after fine-tuning: ")):
        for row in rows(run, name, Response):
            policy = f"{when}{row.policy}, sample {row.sample}"
            yield row.prompt_id, None, {"policy": policy, "text": row.text, "fault": row.fault}
    steps = {row.step for row in rows(run, "ppo-samples.jsonl", Sample)}
    for row in rows(run, "ppo-samples.jsonl", Sample):
        if row.step in (min(steps), max(steps)):
            answer = {"policy": f"PPO, step {row.step:,}", "text": row.response, "fault": None}
            yield row.prompt_id, row.prompt, answer | _numbers(row)
    for row in rows(run, "evaluation.jsonl", Evaluated):
        answer = {"policy": f"evaluated: {row.policy}", "text": row.response, "fault": row.fault}
        answer |= _numbers(row) | ({} if row.refusal is None else {"refusal": row.refusal})
        yield row.prompt_id, None, answer


def _numbers(row: Sample | Evaluated) -> dict[str, float]:
    """The row's score, gold reward and KL, as far as they are known."""
    numbers = {key: getattr(row, key) for key in ("score", "gold", "kl")}
    return {key: round(number, 4) for key, number in numbers.items() if number is not None}
