"""What several tests of PPO start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.toy import save_toy


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy of sixteen words; nobody changes it."""
    return save_toy(tmp_path_factory.mktemp("models") / "toy")
