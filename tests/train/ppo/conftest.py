"""What several tests of PPO start from."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(toy) -> Path:
    """A random policy of sixteen words; nobody changes it."""
    return toy
