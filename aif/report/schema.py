"""What the report reads of a run folder: rows and states, checked and with visible text.

The shape of a file stands beside its writer: store/records.py, train/metrics.py and the schema.py
of auditing, evaluation and train/reward. Here are the states that say how far a stage is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from aif.config.toml import checked
from aif.data.visible import cleaned
from aif.errors import InputError, shown
from aif.run import Run
from aif.stats.schema import Loose
from aif.store import jsonl
from aif.store.records import Message

Row = TypeVar("Row")
State = TypeVar("State", bound=BaseModel)


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
    principles: dict[str, str] = Field({})


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

    tokens: dict[str, int] = Field({})
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
            first = error.errors()[0]
            missing = first["type"].startswith("missing")
            expected = first["msg"].removeprefix("Input should be ")
            raise InputError(
                f"{path}:{number}",
                ".".join(map(str, first["loc"])),
                got="nothing" if missing else shown(first["input"]),
                expected=f"a {kind.__name__} row" if missing else expected,
            ) from None


def state(run: Run, name: str, kind: type[State]) -> State | None:
    """NAME.json as `kind`, None if there is no such file. Raises InputError if it is not one."""
    path = run.file(f"{name}.json")
    try:
        value = jsonl.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(path, "", got=f"bad JSON: {error}", expected="a JSON object") from None
    if not isinstance(value, dict):
        raise InputError(path, "", got=shown(value), expected="a JSON object")
    return checked(kind, cleaned(value), path)
