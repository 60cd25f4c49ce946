"""TOML files and command-line settings, checked strictly: an unknown key is an error."""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from aif.errors import AifError, InputError, shown

T = TypeVar("T", bound=BaseModel)
# What pydantic's messages begin with, before they say what is expected.
LEAD = re.compile(r"(Value error, |Input should be |(String|List|Dictionary|Tuple) should have )")


class Strict(BaseModel):
    """A table that takes the keys it names, of the types it names, and nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def parse_set(argument: str) -> tuple[str, Any]:
    """`a.b=c` as a key and a TOML value; what is not TOML is taken as text."""
    key, equals, text = argument.partition("=")
    if not equals or not key.strip():
        raise InputError("--set", "", got=shown(argument), expected="table.key=value")
    try:
        return key.strip(), tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), text


def put(tables: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of the command line in these tables."""
    *parents, last = key.split(".")
    for parent in parents:
        tables = tables.setdefault(parent, {})
        if not isinstance(tables, dict):
            raise InputError("command line", key, got="a key", expected="a table before the dot")
    tables[last] = value


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
    except IsADirectoryError:
        raise InputError(path, "", got="a folder", expected="a TOML file") from None
    except OSError as error:
        raise AifError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(path, "", got=f"bad TOML: {error}", expected="TOML in UTF-8") from None


def checked(model: type[T], data: dict[str, Any], where: object) -> T:
    """`data` as a `model`, or an InputError about the first thing that is wrong with it."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        errors = error.errors()
        unknown = [e for e in errors if e["type"] == "extra_forbidden"]  # a slip of the pen is why
        raise _explained(model, [*unknown, *errors][0], where) from None  # a key is missing


def _explained(model: type[BaseModel], error: Any, where: object) -> InputError:
    path = error["loc"]
    key = ".".join(str(part) for part in path)
    if error["type"] == "extra_forbidden":
        names = _fields_at(model, path[:-1])
        near = difflib.get_close_matches(str(path[-1]), names, n=1)
        expected = f"{near[0]} perhaps; known keys: " if near else "one of "
        return InputError(where, key, got="an unknown key", expected=expected + ", ".join(names))
    if error["type"] == "missing":
        return InputError(where, key, got="nothing", expected="a value")
    expected = LEAD.sub("", error["msg"], count=1)
    if error["type"] == "string_pattern_mismatch":
        expected = f"a text that matches {error['ctx']['pattern']}"
    if error["type"] in ("model_type", "dict_type"):
        expected = "a table"
    return InputError(where, key, got=shown(error["input"]), expected=expected)


def _fields_at(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """The keys that the table at `path` inside `model` takes."""
    for part in path:
        if isinstance(part, str):
            kind = model.model_fields[part].annotation
            inner = [kind, *getattr(kind, "__args__", ())]
            model = next(m for m in inner if isinstance(m, type) and issubclass(m, BaseModel))
    return list(model.model_fields)
