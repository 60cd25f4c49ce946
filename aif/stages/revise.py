"""Critique and revise responses, a principle a round.

    responses.jsonl -> (calls, journal/revise.jsonl) -> revisions.jsonl

    {"id": "...", "response_id": "...", "round": 1, "principle_id": "kindness",
     "critique": "...", "revision": "...", "fault": null, ...}

A response's rounds are a chain: each revises what the last good one left. A chain goes as far as
the journal knows, and the calls that chains need next are made together; so a killed run goes on,
and an edited principle is asked again in each chain from the round on that drew it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from aif.constitution import file as constitutions
from aif.constitution.file import Principle
from aif.errors import InputError
from aif.llm import LLM, Ask, open_llm
from aif.llm.budget import Meter
from aif.llm.dispatch import Faults, Tally, ask_all
from aif.progress import Progress
from aif.run import Run
from aif.stages.critique import Reviser
from aif.store.journal import Journal
from aif.store.records import Message, Prompt, Response, Revision

STAGE = "revise"


@dataclass
class Chain:
    """A response on its way through the rounds, as far as the journal knows it."""

    response: Response
    prompt: list[Message]
    text: str  # what the next revision starts from
    principle: Principle  # of the round under way
    critique: str | None = None  # of the round under way, once it is there
    usage: Counter[str] = field(default_factory=Counter)  # of the round under way
    done: list[Revision] = field(default_factory=list)
    failed: dict[str, Any] | None = None  # the journal row of a call that came to nothing

    @property
    def round(self) -> int:
        return len(self.done) + 1


def revise(run: Run, progress: Progress) -> dict[str, Any]:
    """Put every good response through `revise.rounds` rounds; returns the summary.

    Raises Interrupted or JudgeStopped when it ended early; the files are in order all the same.
    Whether the summary has more failed calls than allowed is `asking.check_faults`' to say.
    """
    meter = Meter.of(run, STAGE, model_of(run))
    with open_llm(model_of(run)) as llm, run.writing():
        reviser = reviser_of(run, llm)
        chains = list(begin(run, reviser))
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


def model_of(run: Run) -> Any:
    """The settings of the model that revises: `[reviser]`, or else the policy itself."""
    return run.settings.reviser or run.settings.policy


def reviser_of(run: Run, llm: LLM) -> Reviser:
    """The reviser that a run's settings describe, with its constitution checked."""
    path = run.settings.revise.constitution or run.settings.label.constitution
    if not path:
        raise InputError("revise", "constitution", got="nothing", expected="--constitution FILE")
    constitution = constitutions.load(Path(path))
    return Reviser(constitution, model_of(run), run.settings.revise, path, llm.control_tokens)


def begin(run: Run, reviser: Reviser) -> Iterator[Chain]:
    """A chain for every response that has no fault."""
    prompts = {prompt.id: prompt.messages for prompt in run.read("prompts.jsonl", Prompt)}
    path = run.file("responses.jsonl")
    good = (row for row in run.read("responses.jsonl", Response) if row.fault is None and row.text)
    empty = True
    for response in islice(good, run.settings.revise.limit):
        empty = False
        if response.prompt_id not in prompts:
            raise InputError(
                path, "prompt_id", got=response.prompt_id, expected="the id of a prompts.jsonl row"
            )
        principle = reviser.principle(response.id, 1)
        yield Chain(response, prompts[response.prompt_id], response.text or "", principle)
    if empty:
        raise InputError(path, "", got="no response without a fault", expected="at least one")


def ask_in_waves(
    llm: LLM,
    reviser: Reviser,
    chains: list[Chain],
    journal: Journal,
    progress: Progress,
    meter: Meter,
) -> tuple[int, Tally]:
    """Ask until no chain needs a call; returns how many answers were there before, and the tally.

    A call that fails is made once here: its chain waits for the next try.
    """
    asked: set[str] = set()
    total = Tally()
    kept = 0
    while not total.stopped:
        pending = {}
        for chain in chains:
            kept += advance(reviser, chain, journal, asked)
            if ask := next_ask(reviser, chain):
                pending[ask.key] = chain  # chains that come to the same words share a call
        if not pending:
            break
        step = min(2 * chain.round - (chain.critique is None) for chain in pending.values())
        progress.start(f"revise, step {step} of {2 * reviser.settings.rounds}", len(pending))
        asks = (next_ask(reviser, chain) for chain in pending.values())
        asked |= pending.keys()
        total.add(ask_all(llm, filter(None, asks), journal, reviser.journal_row, progress, meter))
        progress.finish()
    else:  # what came in before it stopped counts too
        for chain in chains:
            advance(reviser, chain, journal, asked)
    return kept, total


def next_ask(reviser: Reviser, chain: Chain) -> Ask | None:
    """The call that a chain needs next; None when it is through, or waits after a failed one."""
    if chain.round > reviser.settings.rounds or chain.failed:
        return None
    if chain.critique is None:
        return reviser.ask_critique(chain.prompt, chain.text, chain.principle)
    return reviser.ask_revision(chain.prompt, chain.text, chain.principle, chain.critique)


def advance(reviser: Reviser, chain: Chain, journal: Journal, asked: set[str]) -> int:
    """Take a chain as far as the journal has answers; returns how many of them nobody asked for
    just now. A failed call counts as such only if it is one of `asked`."""
    kept = 0
    while ask := next_ask(reviser, chain):
        row = journal.newest(ask.key)
        if row is None or (row["fault"] and ask.key not in asked):
            break
        if row["fault"]:
            chain.failed = row
            break
        kept += ask.key not in asked
        take(reviser, chain, row)
    return kept


def take(reviser: Reviser, chain: Chain, row: dict[str, Any]) -> None:
    """Move a chain on by one answer: to its revision, or to the next round."""
    chain.usage.update(row["usage"])
    if chain.critique is None:
        text, fault = reviser.critique(row)
        if fault is None:
            chain.critique = text
            return
        revision = None  # without a critique there is nothing to revise by
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


def summarised(chains: list[Chain], tally: Tally, reviser: Reviser) -> dict[str, Any]:
    """What the rounds came to: good revisions and faults by round, and calls that failed."""
    rounds = [[row for chain in chains for row in chain.done if row.round == number + 1]
              for number in range(reviser.settings.rounds)]  # fmt: skip
    rows = [row for found in rounds for row in found]
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
        "revisions": sum(row.fault is None for row in rows),
        "revisions_by_round": [sum(row.fault is None for row in found) for found in rounds],
        "revision_faults": dict(Counter(row.fault for row in rows if row.fault)),
        "faults_by_principle": dict(Counter(row.principle_id for row in rows if row.fault)),
        "unfinished": sum(chain.round <= reviser.settings.rounds for chain in chains),
        "calls_made": tally.answered + tally.faults.total(),
        "tokens": dict(tokens),
        **failed.summary(),
    }
