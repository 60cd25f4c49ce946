"""What `aif evaluate` writes: evaluate.json and the rows of evaluation.jsonl."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from aif.stats.schema import Estimate, Loose


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A row of evaluation.jsonl: a policy's answer to a prompt."""

    policy: str
    prompt_id: str
    response: str | None = None
    fault: str | None = None
    words: float | None = None
    refusal: bool | None = None  # whether the policy declines
    score: float | None = None  # by the reward model, normalised
    gold: float | None = None  # the judge's grade, log-odds of yes
    kl: float | None = None  # log p / p_ref, nats


class PolicyResult(Loose):
    """The statistics of a policy in evaluate.json."""

    name: str = "?"
    model: str | None = None
    responses: int | None = None
    faults: dict[str, int] = Field({})
    gold: Estimate | None = None
    score: Estimate | None = None
    kl: Estimate | None = None
    words: Estimate | None = None
    distinct_1: float | Estimate | None = None
    distinct_2: float | Estimate | None = None
    self_bleu: float | Estimate | None = None
    refusal_rate: float | Estimate | None = None
    refusal_rate_harmful: float | Estimate | None = None
    over_refusal_rate: float | Estimate | None = None
    rating: Estimate | None = None


class Match(Loose):
    """The results of two policies against each other."""

    first: str = "?"
    second: str = "?"
    n: int | None = None
    wins: int | None = None
    ties: int | None = None
    losses: int | None = None
    null: int | None = None
    win_rate: Estimate | None = None
    soft_win_rate: Estimate | None = None
    length_controlled: Estimate | None = None
    by_principle: dict[str, float | None] = Field({})


class People(Loose):
    """How often the judge and the reward model prefer the response that people chose."""

    pairs: int | None = None
    judge: Estimate | None = None
    reward: Estimate | None = None


class Evaluation(Loose):
    """evaluate.json"""

    judge: str | None = None
    protocol: str | None = None
    prompts: int | None = None
    against: str | None = None
    seed: int | None = None
    policies: list[PolicyResult] = Field([])
    matches: list[Match] = Field([])
    human: People | None = None
