"""What the report reads of a run folder: rows and states, checked and with visible text.

The rows of the stages' own files are those of `records`; here are the others. In a state that a
stage leaves, any key may be missing: it was written by an earlier version, or in mid-run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from aif.config.toml import checked
from aif.data.visible import cleaned
from aif.errors import InputError, shown
from aif.run import Run
from aif.store import jsonl
from aif.store.records import Message

Row = TypeVar("Row")
State = TypeVar("State", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Metric:
    """A row of metrics.jsonl."""

    stage: str
    step: int
    name: str
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A row of ppo-samples.jsonl: an answer at a look during PPO."""

    step: int
    prompt_id: str
    prompt: list[Message]
    response: str | None = None
    score: float | None = None
    gold: float | None = None
    kl: float | None = None


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A row of evaluation.jsonl: a policy's answer to a prompt."""

    policy: str
    prompt_id: str
    prompt: list[Message] | None = None
    response: str | None = None
    fault: str | None = None
    score: float | None = None
    gold: float | None = None
    kl: float | None = None
    words: float | None = None
    refusal: bool | None = None


class Loose(BaseModel):
    """A part of a state, of which everything may be missing."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Estimate(Loose):
    """A mean with its interval."""

    mean: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    bound: bool = False  # of a KL: known as an upper bound alone


class Policy(Loose):
    """What evaluate.json says of a policy."""

    name: str = "?"
    model: str | None = None
    responses: int | None = None
    faults: dict[str, int] = {}
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
    """Two policies against each other."""

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
    by_principle: dict[str, float | None] = {}


class People(Loose):
    """How often the judge, and the reward model, prefer what people have chosen."""

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
    policies: list[Policy] = []
    matches: list[Match] = []
    human: People | None = None


class Rate(Loose):
    """A share with Wilson's interval, as `train.card` has it."""

    n: int = 0
    accuracy: float | None = None
    interval: tuple[float, float] | None = None


class Bin(Loose):
    """A bin of a calibration curve."""

    confidence: float
    accuracy: float
    n: int


class Calibration(Loose):
    """How far confidence is what it says."""

    ece: float | None = None
    brier: float | None = None
    bins: list[Bin] = []


class LengthRate(Rate):
    """A share where the better response is longer by so many words."""

    words_more: tuple[float | None, float | None] = (None, None)


class ConfidenceRate(Rate):
    """A share where the label's winner has at least this probability."""

    least: float = Field(0.5, alias="from")


class CardPart(Rate):
    """A reward model held against one kind of label."""

    longer_wins: float | None = None
    calibration: Calibration = Calibration()
    by_length: list[LengthRate] = []
    confident: Rate | None = None
    by_confidence: list[ConfidenceRate] = []


class Spread(Loose):
    """Moments and quantiles (5, 25, 50, 75, 95 %) of scores."""

    n: int
    mean: float
    std: float
    quantiles: tuple[float, float, float, float, float]


class CurvePoint(Rate):
    """Accuracy after learning from so many comparisons."""

    pairs: int


class RewardCard(Loose):
    """reward-card.json"""

    pairs: int | None = None
    ai: CardPart | None = None
    human: CardPart | None = None
    by_principle: dict[str, Rate] = {}
    scores: dict[str, Spread] = {}
    curve: list[CurvePoint] = []


class JudgeId(Loose):
    """The judge that a labelling used."""

    model: str | None = None
    temperature: float | None = None
    samples: int | None = None


class ConstitutionId(Loose):
    """The constitution that a labelling used; of each principle, its digest."""

    file: str | None = None
    name: str | None = None
    digest: str | None = None
    principles: dict[str, str] = {}


class LabelState(Loose):
    """label.json"""

    judge: JudgeId = JudgeId()
    protocol: str | None = None
    draw: str | None = None
    constitution: ConstitutionId = ConstitutionId()
    hard_verdicts: int = 0
    unfinished: int = 0


class TrainState(Loose):
    """sft.json, reward.json or ppo.json"""

    start: str | None = Field(None, alias="from")
    in_progress: bool = False
    algorithm: str | None = None
    steps: int | None = None
    examples: int | None = None
    pairs: int | None = None
    eval_pairs: int | None = None
    prompts: int | None = None
    eval_prompts: int | None = None
    best_step: int | None = None


class CallState(Loose):
    """What any stage that asks a model says of its calls."""

    tokens: dict[str, int] = {}
    in_progress: bool = False


def rows(run: Run, name: str, kind: type[Row]) -> Iterator[Row]:
    """The rows of a JSONL file as `kind`, none if there is no file. Raises InputError for a row
    that is not one, with its line and key."""
    path = run.file(name)
    if not path.exists():
        return
    check = TypeAdapter(kind)
    for number, row in jsonl.read(path):
        try:
            yield check.validate_python(cleaned(row))
        except ValidationError as error:
            found = error.errors()[0]
            missing = found["type"].startswith("missing")
            raise InputError(
                f"{path}:{number}",
                ".".join(map(str, found["loc"])),
                got="nothing" if missing else shown(found["input"]),
                expected=f"a {kind.__name__} row" if missing else _expected(found["msg"]),
            ) from None


def _expected(message: str) -> str:
    return message.removeprefix("Input should be ")


def state(run: Run, name: str, kind: type[State]) -> State | None:
    """NAME.json as `kind`, None if there is no such file. Raises InputError if it is not one."""
    path = run.file(f"{name}.json")
    try:
        found = jsonl.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(path, "", got=f"bad JSON: {error}", expected="a JSON object") from None
    if not isinstance(found, dict):
        raise InputError(path, "", got=shown(found), expected="a JSON object")
    return checked(kind, cleaned(found), path)
