"""A JSON file held against the schema by which it is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel


def missing(shape: type[BaseModel], state: dict[str, Any]) -> Iterator[str]:
    """The keys that the schema names and the file lacks."""
    for name, field in shape.model_fields.items():
        if name not in state:
            yield f"{shape.__name__}.{name}"
            continue
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                held = state[name]
                if get_origin(field.annotation) is dict:
                    held = list(held.values())
                for value in held if isinstance(held, list) else [held]:
                    yield from missing(inner, value) if isinstance(value, dict) else ()
