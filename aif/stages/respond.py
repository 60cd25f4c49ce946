"""Sample responses to prompts: prompts -> (calls, journal/respond.jsonl) -> responses.jsonl.

{"id": "...", "prompt_id": "...", "policy": "smollm2-135m", "sample": 0, "text": "...", ...}

`respond.shots` are solved examples (rows with `prompt` and `response`) that stand before every
prompt as earlier turns. They are not kept with the prompt, so that training goes without them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from aif.data.readers import read_dialogues, read_prompts
from aif.errors import InputError
from aif.llm import Answer, Ask, open_llm
from aif.llm.budget import Meter
from aif.llm.dispatch import ask_all
from aif.progress import Progress
from aif.run import Run
from aif.store.checkpoint import sealed
from aif.store.journal import Journal
from aif.store.records import Message, Prompt, Response, content_id

STAGE = "respond"
AGAIN = "resample"
# As `_transcript` has it: a base model goes on to make up the user's next turn.
NEXT_TURN = "\n\nUser:"


def respond(run: Run, progress: Progress) -> dict[str, Any]:
    """Sample `respond.samples` responses to each prompt from `[policy]`; returns the summary."""
    return _sampled(run, run, STAGE, "responses.jsonl", progress)


def resample(run: Run, progress: Progress) -> dict[str, Any]:
    """The same from what `aif sft` left, into resampled.jsonl: preferences are then of responses
    as the policy that is to learn from them gives them."""
    tuned = run.file("sft")
    if sealed(tuned) is None:
        raise InputError(
            tuned, "", got="no model, or half of one", expected="`aif sft` to have been done"
        )
    settings = run.settings.respond
    of_tuned = run.using(
        policy=run.settings.policy.of_weights(str(tuned)),
        respond=settings.model_copy(update={"samples": settings.resamples or settings.samples}),
    )
    return _sampled(run, of_tuned, AGAIN, "resampled.jsonl", progress)


def _sampled(kept: Run, run: Run, stage: str, file: str, progress: Progress) -> dict[str, Any]:
    """Responses to the run's prompts under the settings of `run`, in `file`; the summary.

    `kept` is the same run with the settings that run.toml is to have.
    """
    meter = Meter.of(run, stage, run.settings.policy)
    with open_llm(run.settings.policy) as llm, run.writing():
        shots = read_shots(run.settings.respond.shots)
        prompts = take_in(run)
        kept.keep_settings()
        with run.journal(stage) as journal:
            asks = [
                ask
                for prompt in prompts
                for ask in asks_for(run, prompt, shots)
                if bytes.fromhex(ask.key) not in journal.index.answered
            ]
            progress.start(stage, len(asks))
            tally = ask_all(llm, asks, journal, _journal_row, progress, meter)
            progress.finish()
            rows = list(_responses(run, prompts, shots, journal))
        written = run.write(file, rows)
        summary = {
            "run": str(run.path),
            "file": file,
            "prompts": len(prompts),
            "responses": written,
            "calls_made": tally.answered + tally.faults.total(),
            "faults": dict(Counter(row.fault for row in rows if row.fault)),
        }
        run.write_state(stage, summary)
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


def read_shots(source: str | None) -> list[Message]:
    """The solved examples of a file, one after the other, as the turns of one conversation."""
    if source is None:
        return []
    turns: list[Message] = []
    for place, dialogue in read_dialogues(source):
        if any(message["role"] == "system" for message in dialogue):
            raise InputError(
                place, "", got="a system message", expected="one in the prompts, not in the shots"
            )
        turns += dialogue
    if not turns:
        raise InputError(source, "", got="no shots at all", expected="at least one")
    return turns


def asks_for(run: Run, prompt: Prompt, shots: list[Message]) -> Iterator[Ask]:
    """One call a sample; its id is of prompt, policy, seed, the sample's number and any shots."""
    policy, settings = run.settings.policy, run.settings.respond
    messages = _with_shots(prompt.messages, shots)
    of_shots = [shots] if shots else []  # without any, the id is what it was before there were any
    identity = policy.identity()
    for sample in range(settings.samples):
        key = content_id(
            "response", prompt.id, identity, policy.form, settings.seed, sample, *of_shots
        )
        yield Ask(
            key=key,
            messages=messages if policy.form != "text" else None,
            text=_transcript(messages) if policy.form == "text" else None,
            max_tokens=policy.response_tokens,
            temperature=policy.temperature,
            seed=int(key[:8], 16),
            stop=(NEXT_TURN,) if policy.form == "text" else (),
        )


def _with_shots(messages: list[Message], shots: list[Message]) -> list[Message]:
    """The shots before the prompt's turns, but after its system message."""
    start = 0
    while start < len(messages) and messages[start]["role"] == "system":
        start += 1
    return [*messages[:start], *shots, *messages[start:]]


def _transcript(messages: list[Message]) -> str:
    """The conversation as text, for a model that has no chat form."""
    turns = [f"{message['role'].title()}: {message['content']}" for message in messages]
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


def _responses(
    run: Run, prompts: list[Prompt], shots: list[Message], journal: Journal
) -> Iterator[Response]:
    for prompt in prompts:
        for sample, ask in enumerate(asks_for(run, prompt, shots)):
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
