"""Settings: defaults, then run.toml, then the command line; an unknown key is an error.

[judge]
model = "openai:gpt-4.1-mini"
base_url = "http://localhost:8000/v1"

[label]
pairs = "pairs.jsonl"
constitution = "constitutions/warm.toml"
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aif.errors import AifError, InputError, shown

T = TypeVar("T", bound=BaseModel)


class Strict(BaseModel):
    """A table that takes the keys it names, of the types it names, and nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LLMSettings(Strict):
    """A model and how to ask it."""

    model: str = Field("smollm2-135m", min_length=1)
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"  # the key's name; the key itself is never in a file
    form: Literal["auto", "chat", "text"] = "auto"
    temperature: float = Field(0.0, ge=0, le=5)
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)  # None: what the stage needs
    samples: int = Field(1, ge=1, le=256)
    logprobs: bool = True
    check_model: bool = True
    concurrency: int = Field(64, ge=1, le=10_000)
    timeout_s: float = Field(120, gt=0)
    attempts: int = Field(6, ge=1, le=100)
    max_wait_s: float = Field(60, gt=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"

    def identity(self) -> dict[str, Any]:
        """What an answer depends on; it enters every verdict's id. No secrets, no tuning."""
        keys = {"model", "temperature", "max_tokens", "samples", "logprobs", "dtype"}
        return self.model_dump(include=keys) | {"base_url": without_secrets(self.base_url)}

    @property
    def verdict_tokens(self) -> int:
        """Tokens that a verdict may take: one where its log-probabilities are read, else a few."""
        return self.max_tokens or (1 if self.logprobs else 16)

    @property
    def response_tokens(self) -> int:
        return self.max_tokens or 256


class PolicySettings(LLMSettings):
    """The model that is sampled from."""

    temperature: float = Field(1.0, ge=0, le=5)


class RespondSettings(Strict):
    """Sampling responses to prompts."""

    prompts: str | None = None
    samples: int = Field(2, ge=1, le=1000)
    seed: int = 0
    limit: int | None = Field(None, ge=1)


class CompareSettings(Strict):
    """Which of a prompt's responses are put side by side."""

    per_prompt: int | None = Field(None, ge=1)  # None: every pair
    seed: int = 0


class LabelSettings(Strict):
    """Judging comparisons under a constitution."""

    pairs: str | None = None
    constitution: str | None = None
    protocol: Literal["auto", "pairwise", "pointwise"] = "auto"
    template: str | None = None
    seed: int = 0
    limit: int | None = Field(None, ge=1)
    quorum: float = Field(1.0, gt=0, le=1)
    max_fault_rate: float = Field(0.05, ge=0, le=1)


class Settings(Strict):
    """Everything a run can be told, table by table."""

    policy: PolicySettings = PolicySettings()
    judge: LLMSettings = LLMSettings()
    respond: RespondSettings = RespondSettings()
    compare: CompareSettings = CompareSettings()
    label: LabelSettings = LabelSettings()

    def to_keep(self) -> dict[str, Any]:
        """What differs from the defaults, as run.toml's tables.

        No secrets, and no limits: those are of one command.
        """
        tables = self.model_dump(exclude_defaults=True, exclude_none=True)
        for table in tables.values():
            table.pop("limit", None)
            if "base_url" in table:
                table["base_url"] = without_secrets(table["base_url"])
        return tables


def without_secrets(url: str | None) -> str | None:
    """A URL less its user, password, query and fragment, where keys hide."""
    if url is None:
        return None
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def load_settings(path: Path, overrides: dict[str, Any]) -> Settings:
    """Defaults < `path` (if it exists) < `overrides` (dotted keys, None: not given)."""
    tables = read_toml(path) if path.exists() else {}
    checked(Settings, tables, path)  # so that an error names the file, not the command line
    for key, value in overrides.items():
        if value is not None:
            _put(tables, key, value)
    return checked(Settings, tables, "command line")


def _put(tables: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tables = tables.setdefault(parent, {})
        if not isinstance(tables, dict):
            raise InputError("command line", key, got="a key", expected="a table before the dot")
    tables[last] = value


def parse_set(argument: str) -> tuple[str, Any]:
    """`a.b=c` as a key and a TOML value; what is not TOML is taken as text."""
    key, equals, text = argument.partition("=")
    if not equals or not key.strip():
        raise InputError("--set", "", got=shown(argument), expected="table.key=value")
    try:
        return key.strip(), tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), text


def read_toml(path: Path, max_bytes: int = 1_000_000) -> dict[str, Any]:
    """A TOML file's tables. Errors name the file, and line and column where TOML says so."""
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise InputError(path, "", got="a larger file", expected=f"at most {max_bytes:,} bytes")
        return tomllib.loads(data.decode("utf-8"))
    except FileNotFoundError:
        raise InputError(path, "", got="no such file", expected="a TOML file") from None
    except OSError as error:
        raise AifError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(path, "", got=f"bad TOML: {error}", expected="TOML in UTF-8") from None


def checked(model: type[T], data: dict[str, Any], where: object) -> T:
    """`data` as a `model`, or an InputError about the first thing that is wrong with it."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = error.errors()
        unknown = [e for e in found if e["type"] == "extra_forbidden"]  # a slip of the pen is why
        raise _explained(model, [*unknown, *found][0], where) from None  # a key is missing


def _explained(model: type[BaseModel], error: Any, where: object) -> InputError:
    path = error["loc"]
    key = ".".join(str(part) for part in path)
    if error["type"] == "extra_forbidden":
        known = _fields_at(model, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1)
        expected = f"{near[0]} perhaps; known keys: " if near else "one of "
        return InputError(where, key, got="an unknown key", expected=expected + ", ".join(known))
    expected = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] == "missing":
        return InputError(where, key, got="nothing", expected="a value")
    return InputError(where, key, got=shown(error["input"]), expected=expected)


def _fields_at(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """The keys that the table at `path` inside `model` takes."""
    for part in path:
        if isinstance(part, str):
            kind = model.model_fields[part].annotation
            inner = [kind, *getattr(kind, "__args__", ())]
            model = next(m for m in inner if isinstance(m, type) and issubclass(m, BaseModel))
    return list(model.model_fields)
