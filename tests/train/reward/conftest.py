"""Fixtures of the tests that train reward models."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny import quick


@pytest.fixture(scope="module")
def quickly():
    with quick():
        yield


@pytest.fixture(scope="module")
def model(tiny) -> Path:
    return tiny
