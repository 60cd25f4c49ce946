"""Critique and revise responses, one principle per round.

    responses.jsonl -> (calls, journal/revise.jsonl) -> revisions.jsonl

    {"id": "...", "response_id": "...", "round": 1, "principle_id": "kindness",
     "critique": "...", "revision": "...", "fault": null, ...}

The rounds of a response are a chain: each round revises the text of the last round without a fault.
Each chain is replayed from the answers in the journal, and then the next calls of all chains are
made together. So a killed run goes on where it stopped. After an edit of a principle, a chain asks
again from the first round that uses it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from aif.constitution import file as constitutions
from aif.constitution.file import Principle
from aif.errors import InputError
from aif.llm import LLM, Ask, open_llm
from aif.llm.budget import Meter
from aif.llm.dispatch import CallTally, Faults, ask_all
from aif.progress import Progress
from aif.run import Run
from aif.stages.critique import Reviser
from aif.store.journal import Journal, Reader
from aif.store.records import Message, Prompt, Response, Revision

STAGE = "revise"


@dataclass
class Chain:
    """The rounds of one response, as far as the journal has answers."""

    response: Response
    prompt: list[Message]
    text: str  # the text that the next revision revises
    principle: Principle  # of this round
    critique: str | None = None  # of this round, once there is one
    usage: Counter[str] = field(default_factory=Counter)  # of this round
    done: list[Revision] = field(default_factory=list)
    failed: dict[str, Any] | None = None  # the journal row of a call that failed

    @property
    def round(self) -> int:
        return len(self.done) + 1


def revise(run: Run, progress: Progress) -> dict[str, Any]:
    """Put every good response through `revise.rounds` rounds; returns the summary.

    Raises Interrupted or JudgeStopped if it ended early; the files are complete for the answers so
    far. `dispatch.check_faults` checks the summary's share of faults.
    """
    meter = Meter.of(run, STAGE, run.settings.reviser_model)
    with open_llm(run.settings.reviser_model) as llm, run.writing():
        reviser = reviser_of(run, llm)
        chains = begin(run, reviser)
        run.keep_settings()
        with run.journal(STAGE) as journal:
            for line in journal.damage():
                progress.say(line)
            kept, tally = ask_in_waves(llm, reviser, chains, journal, progress, meter)
        run.write("revisions.jsonl", (row for chain in chains for row in chain.done))
        summary = {"run": str(run.path), "calls_kept": kept} | summarised(chains, tally, reviser)
        run.write_state(STAGE, summary)
    if tally.stopped:
        raise tally.stopped
    return summary


def reviser_of(run: Run, llm: LLM) -> Reviser:
    """The reviser that a run's settings describe, with its constitution checked."""
    settings = run.settings
    path = settings.revise.constitution or settings.label.constitution
    if not path:
        raise InputError("revise", "constitution", got="nothing", expected="--constitution FILE")
    constitution = constitutions.load(Path(path))
    return Reviser(constitution, settings.reviser_model, settings.revise, path, llm.control_tokens)


def begin(run: Run, reviser: Reviser) -> list[Chain]:
    """A chain for every response without a fault."""
    prompts = {prompt.id: prompt.messages for prompt in run.read("prompts.jsonl", Prompt)}
    path = run.file("responses.jsonl")
    good = (row for row in run.read("responses.jsonl", Response) if row.fault is None and row.text)
    chains = []
    for response in islice(good, run.settings.revise.limit):
        if response.prompt_id not in prompts:
            raise InputError(
                path, "prompt_id", got=response.prompt_id, expected="the id of a prompts.jsonl row"
            )
        principle = reviser.principle(response.id, 1)
        prompt = prompts[response.prompt_id]
        chains.append(Chain(response, prompt, response.text or "", principle))
    if not chains:
        raise InputError(path, "", got="no response without a fault", expected="at least one")
    return chains


def ask_in_waves(
    llm: LLM,
    reviser: Reviser,
    chains: list[Chain],
    journal: Journal,
    progress: Progress,
    meter: Meter,
) -> tuple[int, CallTally]:
    """Ask until no chain needs a call; returns the number of answers from earlier runs, and the
    tally.

    A failed call is not made again here; its chain goes on in the next run.
    """
    scheduled: set[str] = set()
    total = CallTally()
    kept = 0
    while not total.stopped:
        pending = {}
        for chain in chains:
            kept += advance(reviser, chain, journal, scheduled)
            if ask := next_ask(reviser, chain):
                pending[ask.key] = ask, chain  # two chains with the same texts share a call
        if not pending:
            break
        step = min(2 * chain.round - (chain.critique is None) for _, chain in pending.values())
        asks = (ask for ask, _ in pending.values())
        scheduled |= pending.keys()
        with progress.work(f"revise, step {step} of {2 * reviser.settings.rounds}", len(pending)):
            total.add(ask_all(llm, asks, journal, reviser.journal_row, progress, meter))
    else:  # answers that came in before it stopped count too
        for chain in chains:
            advance(reviser, chain, journal, scheduled)
    return kept, total


def next_ask(reviser: Reviser, chain: Chain) -> Ask | None:
    """The next call of a chain; None if the chain is complete or its last call failed."""
    if chain.round > reviser.settings.rounds or chain.failed:
        return None
    if chain.critique is None:
        return reviser.ask_critique(chain.prompt, chain.text, chain.principle)
    return reviser.ask_revision(chain.prompt, chain.text, chain.principle, chain.critique)


def advance(reviser: Reviser, chain: Chain, journal: Reader, scheduled: set[str]) -> int:
    """Replay a chain from the answers in the journal; returns how many of these are from an earlier
    run, that is, not of `scheduled` calls. A call that failed in an earlier run is made again."""
    kept = 0
    while ask := next_ask(reviser, chain):
        row = journal.newest(ask.key)
        if row is None or (row["fault"] and ask.key not in scheduled):
            break
        if row["fault"]:
            chain.failed = row
            break
        kept += ask.key not in scheduled
        take(reviser, chain, row)
    return kept


def take(reviser: Reviser, chain: Chain, row: dict[str, Any]) -> None:
    """Add one answer to a chain, which then needs its revision or is in its next round."""
    chain.usage.update(row["usage"])
    if chain.critique is None:
        text, fault = reviser.critique(row)
        if fault is None:
            chain.critique = text
            return
        revision = None  # a round without a critique ends here
    else:
        text, fault = reviser.revision(row, chain.text)
        revision = text if fault is None else None
    chain.done.append(
        Revision(
            id=row["id"],
            response_id=chain.response.id,
            prompt_id=chain.response.prompt_id,
            round=chain.round,
            principle_id=chain.principle.id,
            reviser=reviser.model.model,
            critique=chain.critique,
            revision=revision,
            fault=fault,
            usage=dict(chain.usage),
        )
    )
    chain.text = revision or chain.text
    chain.critique, chain.usage = None, Counter()
    chain.principle = reviser.principle(chain.response.id, chain.round)


def summarised(chains: list[Chain], tally: CallTally, reviser: Reviser) -> dict[str, Any]:
    """Counts of revisions and of their faults, and of failed calls."""
    rows = [row for chain in chains for row in chain.done]
    good = Counter(row.round for row in rows if row.fault is None)
    tokens: Counter[str] = Counter()
    for row in rows:
        tokens.update(row.usage)
    answers = sum(1 + (row.critique is not None) for row in rows)
    answers += sum(chain.critique is not None for chain in chains)
    failed = Faults(calls=answers)
    for chain in chains:
        if chain.failed:
            failed.add(chain.failed)
    return {
        "responses": len(chains),
        "rounds": reviser.settings.rounds,
        "revisions": good.total(),
        "revisions_by_round": [good[n + 1] for n in range(reviser.settings.rounds)],
        "revision_faults": dict(Counter(row.fault for row in rows if row.fault)),
        "faults_by_principle": dict(Counter(row.principle_id for row in rows if row.fault)),
        "unfinished": sum(chain.round <= reviser.settings.rounds for chain in chains),
        "calls_made": tally.calls,
        "tokens": dict(tokens),
        **failed.summary(),
    }
