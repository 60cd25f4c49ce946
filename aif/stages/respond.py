"""Sample responses to prompts: prompts -> (calls, journal/respond.jsonl) -> responses.jsonl.

{"id": "...", "prompt_id": "...", "policy": "smollm2-135m", "sample": 0, "text": "...", ...}

`respond.few_shot` is a file of solved examples (rows with `prompt` and `response`). They are
earlier turns before every prompt. They are not stored with it, so training does not see them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from aif.config.settings import Settings
from aif.data.readers import read_dialogues, read_prompts
from aif.data.transcript import NEXT_TURN, is_padded, transcript
from aif.errors import InputError
from aif.llm import Answer, Ask, open_llm
from aif.llm.budget import Meter
from aif.llm.dispatch import ask_all
from aif.progress import Progress
from aif.run import Run
from aif.store.checkpoint import sealed
from aif.store.journal import Reader
from aif.store.records import Message, Prompt, Response, content_id

STAGE = "respond"
AGAIN = "resample"


def respond(run: Run, progress: Progress) -> dict[str, Any]:
    """Sample `respond.samples` responses to each prompt from `[policy]`; returns the summary."""
    return _sample(run, run, STAGE, "responses.jsonl", progress)


def resample(run: Run, progress: Progress) -> dict[str, Any]:
    """Sample from the model of `aif sft` into resampled.jsonl, so that preferences are about the
    responses of the policy that will learn from them; returns the summary."""
    tuned = run.file("sft")
    if sealed(tuned) is None:
        raise InputError(
            tuned, "", got="no model, or half of one", expected="`aif sft` to have been done"
        )
    settings = run.settings.respond
    of_tuned = run.using(
        policy=run.settings.policy.of_weights(str(tuned)),
        respond=settings.model_copy(update={"samples": settings.sft_samples or settings.samples}),
    )
    return _sample(of_tuned, run, AGAIN, "resampled.jsonl", progress)


def _sample(run: Run, kept: Run, stage: str, file: str, progress: Progress) -> dict[str, Any]:
    """Sample as the settings of `run` say and write `file`; returns the summary. `kept` is the same
    run with the settings for run.toml."""
    settings = run.settings
    meter = Meter.of(run, stage, settings.policy)
    with open_llm(settings.policy) as llm, run.writing():
        few_shot = read_few_shot(settings.respond.few_shot)
        prompts = take_in(run)
        kept.keep_settings()
        with run.journal(stage) as journal:
            asks = [
                ask
                for prompt in prompts
                for ask in sample_asks(settings, prompt, few_shot)
                if bytes.fromhex(ask.key) not in journal.index.answered
            ]
            with progress.work(stage, len(asks)):
                tally = ask_all(llm, asks, journal, _journal_row, progress, meter)
            rows = list(_responses(settings, prompts, few_shot, journal))
        run.write(file, rows)
        summary = {
            "run": str(run.path),
            "file": file,
            "prompts": len(prompts),
            "responses": len(rows),
            "calls_made": tally.calls,
            "faults": dict(Counter(row.fault for row in rows if row.fault)),
        }
        run.write_state(stage, summary)
    if tally.stopped:
        raise tally.stopped
    return summary


def take_in(run: Run) -> list[Prompt]:
    """The distinct prompts of `respond.prompts`, which are also written to prompts.jsonl."""
    source = run.settings.respond.prompts
    if source is None:
        raise InputError("respond", "prompts", got="nothing", expected="--prompts FILE")
    rows = islice(read_prompts(source), run.settings.respond.limit)
    prompts = list({prompt.id: prompt for prompt in rows}.values())
    if not prompts:
        raise InputError(source, "", got="no prompts at all", expected="at least one")
    run.write("prompts.jsonl", prompts)
    return prompts


def read_few_shot(source: str | None) -> list[Message]:
    """The solved examples of a file, one after the other, as the turns of one conversation."""
    if source is None:
        return []
    turns: list[Message] = []
    for place, dialogue in read_dialogues(source):
        if any(message["role"] == "system" for message in dialogue):
            raise InputError(place, "", got="a system message", expected="one in the prompts alone")
        turns += dialogue
    if not turns:
        raise InputError(source, "", got="no examples at all", expected="at least one")
    return turns


def sample_asks(settings: Settings, prompt: Prompt, few_shot: list[Message]) -> Iterator[Ask]:
    """One call per sample. Its id depends on prompt, policy, seed, sample number and few-shot
    examples."""
    policy, respond = settings.policy, settings.respond
    messages = _with_few_shot(prompt.messages, few_shot)
    identity, is_text = policy.identity(), policy.form == "text"
    more: list[Any] = [few_shot] if few_shot else []  # none: ids stay as in version 0.1
    if is_text and is_padded(messages):
        more.append("stripped")  # version 0.1 sampled with the space around turns
    for sample in range(respond.samples):
        key = content_id("response", prompt.id, identity, policy.form, respond.seed, sample, *more)
        yield Ask(
            key=key,
            messages=None if is_text else messages,
            text=transcript(messages, prompt=True) if is_text else None,
            max_tokens=policy.response_tokens,
            temperature=policy.temperature,
            seed=int(key[:8], 16),
            stop=(NEXT_TURN,) if is_text else (),
        )


def _with_few_shot(messages: list[Message], few_shot: list[Message]) -> list[Message]:
    """The examples before the prompt's turns, but after its system message."""
    start = 0
    while start < len(messages) and messages[start]["role"] == "system":
        start += 1
    return [*messages[:start], *few_shot, *messages[start:]]


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
    settings: Settings, prompts: list[Prompt], few_shot: list[Message], journal: Reader
) -> Iterator[Response]:
    """The responses in the journal, with or without a fault."""
    for prompt in prompts:
        for sample, ask in enumerate(sample_asks(settings, prompt, few_shot)):
            row = journal.newest(ask.key)
            if row is not None:
                yield Response(
                    id=ask.key,
                    prompt_id=prompt.id,
                    policy=settings.policy.model,
                    sample=sample,
                    text=row["text"],
                    finish=row["finish"],
                    fault=row["fault"],
                    usage=row["usage"],
                )
