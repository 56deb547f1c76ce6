"""The checkpoints of all families, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model.families.matrix import CASES


@pytest.fixture(scope="package")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """(directory with a checkpoint for each case, name of a case -> its reference)."""
    root, references = tmp_path_factory.mktemp("families"), {}
    for name, case in CASES.items():
        (root / name).mkdir()
        references[name] = case.write(root / name)
    return root, references
