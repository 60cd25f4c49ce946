"""Fixtures of the tests that train reward models."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny import quick, save_tiny


@pytest.fixture(scope="module")
def quickly():
    with quick():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")
