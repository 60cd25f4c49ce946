"""Majority votes of a prompt's responses: responses.jsonl -> votes.jsonl. No model is asked.

{"prompt_id": "...", "answer": "42", "fault": null, "share": 0.75, "responses": 8, ...}

The responses that end in the answer which most of them end in are data to train on (Huang et al.
2022, 2210.11610; the vote is the self-consistency of Wang et al. 2022, 2203.11171). Every sample
has one vote; of samples with the same text one is kept. A response with a fault or without an
answer has no vote, but counts in `share`, and a tie has no winner. What the prompts file may hold
as the right `answer` never bears on a vote: the summary says how often the two agree.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any, NamedTuple

from aif.config.settings import VoteSettings
from aif.data.final_answer import PATTERN_S, final_answer, normalise
from aif.data.readers import read_prompts, read_rows
from aif.errors import AifError, InputError, shown
from aif.progress import Progress
from aif.run import Run
from aif.store.records import Prompt, Response, Vote

STAGE = "vote"


class Ballot(NamedTuple):
    """What counts of a response; texts are long, so only a hash of each is held."""

    sample: int
    response_id: str
    answer: str | None
    text_hash: int


def vote(run: Run, progress: Progress) -> dict[str, Any]:
    """Write votes.jsonl; returns the summary."""
    settings = run.settings.vote
    pattern = compiled(settings.answer)
    with run.writing():
        prompts = [prompt.id for prompt in run.read("prompts.jsonl", Prompt)]
        ballots: dict[str, list[Ballot]] = defaultdict(list)
        for response in run.read("responses.jsonl", Response):
            ballots[response.prompt_id].append(cast(response, pattern))
        rows = [count(prompt, ballots[prompt], settings) for prompt in prompts if ballots[prompt]]
        if not rows:
            raise InputError(
                run.path / "responses.jsonl",
                "",
                got="no response to a prompt of the run",
                expected="at least one",
            )
        run.write("votes.jsonl", rows)
        shares = [row.share for row in rows if row.answer is not None]
        summary = {
            "run": str(run.path),
            "prompts": len(prompts),
            "votes": len(shares),
            "faults": dict(Counter(row.fault for row in rows if row.fault)),
            "responses_kept": sum(len(row.response_ids) for row in rows),
            "mean_share": sum(shares) / len(shares) if shares else None,
        } | accuracy(rows, ballots, gold_answers(run, progress))
        run.write_state(STAGE, summary)
    progress.say(f"vote: {len(shares):,} votes on {len(prompts):,} prompts")
    return summary


def compiled(answer: str | None) -> re.Pattern[str] | None:
    """`vote.answer` as a pattern, if there is one."""
    if answer is None:
        return None
    try:
        pattern = re.compile(answer)
    except (re.error, OverflowError, RecursionError) as error:
        expected = f"a regex with one group ({error})"
        raise InputError("vote", "answer", got=shown(answer), expected=expected) from None
    if pattern.groups != 1:
        got = f"{shown(answer)} with {pattern.groups} groups"
        raise InputError("vote", "answer", got=got, expected="a regex with one group")
    return pattern


def cast(response: Response, pattern: re.Pattern[str] | None) -> Ballot:
    """The response's vote, if it has one."""
    text = (response.text or "") if response.fault is None else ""
    if response.finish == "length":
        # Cut off: the last sentence may be half of one, and "is 1" the beginning of "is 18".
        text = text[: 1 + max(text.rfind(end) for end in ("\n", ". ", "! ", "? "))]
    try:
        answer = final_answer(text, pattern)
    except TimeoutError:
        raise InputError(
            "vote", "answer", got=f"over {PATTERN_S:g} s for response {response.id[:12]}",
            expected="a regex that does not try the same text in many ways",
        ) from None  # fmt: skip
    return Ballot(response.sample, response.id, answer, hash(response.text))


def count(prompt_id: str, ballots: list[Ballot], settings: VoteSettings) -> Vote:
    """The vote of one prompt's responses; there is at least one."""
    ballots = sorted(ballots, key=lambda ballot: ballot.sample)
    answered = [ballot for ballot in ballots if ballot.answer is not None]
    ranks = Counter(ballot.answer for ballot in answered).most_common(2)
    winner, most = ranks[0] if ranks else (None, 0)
    share = most / len(ballots)
    fault = None
    if winner is None:
        fault = "unparsed"
    elif len(ranks) == 2 and ranks[1][1] == most:
        fault = "tied"
    elif share < settings.min_share:
        fault = "unsure"
    kept: dict[int, str] = {}
    for ballot in answered:
        if fault is None and ballot.answer == winner:
            kept.setdefault(ballot.text_hash, ballot.response_id)
    return Vote(
        prompt_id=prompt_id,
        answer=winner if fault is None else None,
        fault=fault,
        share=share,
        responses=len(ballots),
        answered=len(answered),
        response_ids=list(kept.values())[: settings.per_prompt],
    )


def gold_answers(run: Run, progress: Progress) -> dict[str, str]:
    """The right answers, by prompt, where the rows of `respond.prompts` hold one as `answer`.

    They only serve the summary, so a file that is gone by now does not stop the vote.
    """
    source, gold = run.settings.respond.prompts, {}
    if source is None:
        return gold
    try:
        # Two readers of the one file, row by row: a prompt keeps nothing of its row's other keys.
        for (_, row), prompt in zip(read_rows(source), read_prompts(source), strict=True):
            if isinstance(row.get("answer"), str | int | float):
                said = str(row["answer"])  # GSM8K's is a whole solution
                answer = final_answer(said) or normalise(said)
                if answer is not None:
                    gold.setdefault(prompt.id, answer)
    except AifError as error:
        progress.say(f"vote: no accuracy: {error}")
        return {}
    return gold


def accuracy(
    rows: list[Vote], ballots: dict[str, list[Ballot]], gold: dict[str, str]
) -> dict[str, Any]:
    """How often votes and single responses are right, over the prompts with a gold answer.

    A prompt without a vote, or a response without an answer, is not right.
    """
    known = [row for row in rows if row.prompt_id in gold]
    if not known:
        return {}
    right = sum(row.answer == gold[row.prompt_id] for row in known)
    voted = sum(row.answer is not None for row in known)
    single = 0.0
    for row in known:
        answers = [ballot.answer for ballot in ballots[row.prompt_id]]
        single += answers.count(gold[row.prompt_id]) / len(answers)
    return {
        "prompts_with_gold": len(known),
        "accuracy_vote": right / len(known),
        "accuracy_where_voted": right / voted if voted else None,
        "accuracy_single": single / len(known),
    }
