"""Majority votes over a prompt's responses: responses.jsonl -> votes.jsonl. No model is asked.

{"prompt_id": "...", "answer": "42", "fault": null, "share": 0.75, "responses": 8, ...}

The responses with the most common final answer become training data (Huang et al. 2022, 2210.11610;
the vote is the self-consistency of Wang et al. 2022, 2203.11171). Every sample has one vote;
samples with the same text are kept once. A response with a fault or without an answer has no vote,
but counts in `share`; a tie has no winner. A reference `answer` in the prompts file never affects a
vote: the summary only says how often the two agree.
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
    """The vote of one response, with a hash of its text in place of the text, to save memory."""

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
        } | accuracy(rows, ballots, reference_answers(run, progress))
        run.write_state(STAGE, summary)
    progress.say(f"vote: {len(shares):,} votes on {len(prompts):,} prompts")
    return summary


def compiled(answer: str | None) -> re.Pattern[str] | None:
    """The pattern of `vote.answer`, or None; InputError for a wrong one."""
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
    """The ballot of a response; its answer is None if it has no vote."""
    text = (response.text or "") if response.fault is None else ""
    if response.finish == "length":
        # Without a last sentence that may be cut off: "is 1" may be the start of "is 18".
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
    """The vote of one prompt's responses, of which there is at least one."""
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


def reference_answers(run: Run, progress: Progress) -> dict[str, str]:
    """The reference answers by prompt id, from `answer` in the rows of `respond.prompts`.

    They serve only the summary, so a missing file does not stop the vote.
    """
    source = run.settings.respond.prompts
    answers: dict[str, str] = {}
    if source is None:
        return answers
    try:
        # Read the file twice, row by row: a Prompt does not keep the other keys of its row.
        for (_, row), prompt in zip(read_rows(source), read_prompts(source), strict=True):
            if isinstance(row.get("answer"), str | int | float):
                solution = str(row["answer"])  # in GSM8K it includes all steps
                answer = final_answer(solution) or normalise(solution)
                if answer is not None:
                    answers.setdefault(prompt.id, answer)
    except AifError as error:
        progress.say(f"vote: no accuracy: {error}")
        return {}
    return answers


def accuracy(
    rows: list[Vote], ballots: dict[str, list[Ballot]], reference: dict[str, str]
) -> dict[str, Any]:
    """How often votes and single responses are right, over the prompts with a reference answer.

    A prompt without a vote, or a response without an answer, is wrong.
    """
    checked = [row for row in rows if row.prompt_id in reference]
    if not checked:
        return {}
    right = sum(row.answer == reference[row.prompt_id] for row in checked)
    voted = sum(row.answer is not None for row in checked)
    single = 0.0
    for row in checked:
        answers = [ballot.answer for ballot in ballots[row.prompt_id]]
        single += answers.count(reference[row.prompt_id]) / len(answers)
    return {
        "prompts_with_gold": len(checked),
        "accuracy_vote": right / len(checked),
        "accuracy_where_voted": right / voted if voted else None,
        "accuracy_single": single / len(checked),
    }
