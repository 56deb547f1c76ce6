"""Flags that are always needed."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """The two flags that are always needed, with files that exist."""
    (tmp_path / "base").mkdir()
    (tmp_path / "data.json").touch()
    return ["--pretrained_path", str(tmp_path / "base"), "--data_config", str(tmp_path / "data.json")]
