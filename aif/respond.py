"""Sample responses to prompts: prompts -> (calls, journal/respond.jsonl) -> responses.jsonl.

{"id": "...", "prompt_id": "...", "policy": "smollm2-135m", "sample": 0, "text": "...", ...}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from aif.asking import ask_all
from aif.errors import InputError
from aif.journal import Journal
from aif.llm import Answer, Ask, open_llm
from aif.pairs import read_prompts
from aif.progress import Progress
from aif.records import Prompt, Response, content_id
from aif.run import Run

STAGE = "respond"


def respond(run: Run, progress: Progress) -> dict[str, Any]:
    """Sample `respond.samples` responses to each prompt from `[policy]`; returns the summary."""
    with open_llm(run.settings.policy) as llm, run.writing():
        prompts = take_in(run)
        run.keep_settings()
        with run.journal(STAGE) as journal:
            asks = [
                ask
                for prompt in prompts
                for ask in asks_for(run, prompt)
                if bytes.fromhex(ask.key) not in journal.index.answered
            ]
            progress.start("respond", len(asks))
            tally = ask_all(llm, asks, journal, _journal_row, progress)
            progress.finish()
            rows = list(_responses(run, prompts, journal))
        written = run.write("responses.jsonl", rows)
        summary = {
            "run": str(run.path),
            "prompts": len(prompts),
            "responses": written,
            "calls_made": tally.answered + tally.faults.total(),
            "faults": dict(Counter(row.fault for row in rows if row.fault)),
        }
        run.write_state(STAGE, summary)
    if tally.stopped:
        raise tally.stopped
    return summary


def take_in(run: Run) -> list[Prompt]:
    """The distinct prompts of `respond.prompts`, also kept as prompts.jsonl."""
    source = run.settings.respond.prompts
    if source is None:
        raise InputError("respond", "prompts", got="nothing", expected="--prompts FILE")
    found = islice(read_prompts(source), run.settings.respond.limit)
    prompts = list({prompt.id: prompt for prompt in found}.values())
    if not prompts:
        raise InputError(source, "", got="no prompts at all", expected="at least one")
    run.write("prompts.jsonl", prompts)
    return prompts


def asks_for(run: Run, prompt: Prompt) -> Iterator[Ask]:
    """One call a sample; its id is of prompt, policy, seed and the sample's number."""
    policy, settings = run.settings.policy, run.settings.respond
    for sample in range(settings.samples):
        key = content_id(
            "response", prompt.id, policy.identity(), policy.form, settings.seed, sample
        )
        yield Ask(
            key=key,
            messages=prompt.messages if policy.form != "text" else None,
            text=_transcript(prompt) if policy.form == "text" else None,
            max_tokens=policy.response_tokens,
            temperature=policy.temperature,
            seed=int(key[:8], 16),
        )


def _transcript(prompt: Prompt) -> str:
    """The conversation as text, for a model that has no chat form."""
    turns = [f"{message['role'].title()}: {message['content']}" for message in prompt.messages]
    return "\n\n".join([*turns, "Assistant:"])


def _journal_row(answer: Answer) -> dict[str, Any]:
    text = answer.texts[0] if answer.texts else None
    fault = answer.fault or (None if text and text.strip() else "empty")
    return {
        "id": answer.key,
        "fault": fault,
        "text": text,
        "finish": answer.finish,
        "detail": answer.detail,
        "usage": answer.usage,
    }


def _responses(run: Run, prompts: list[Prompt], journal: Journal) -> Iterator[Response]:
    for prompt in prompts:
        for sample, ask in enumerate(asks_for(run, prompt)):
            row = journal.newest(ask.key)
            if row is not None:
                yield Response(
                    id=ask.key,
                    prompt_id=prompt.id,
                    policy=run.settings.policy.model,
                    sample=sample,
                    text=row["text"],
                    finish=row["finish"],
                    fault=row["fault"],
                    usage=row["usage"],
                )
