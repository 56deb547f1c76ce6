"""Writing AWQ's files: numbers of fewer bits than theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoint.formats.low_bit_models import converted, logits


@pytest.mark.parametrize("name", ["gptq-4", "gptq-2", "gptq_v2-3"])
def test_awq_holds_whole_points_of_any_width(written, tmp_path: Path, name: str) -> None:
    """Numbers of fewer bits are written in four; no weight changes."""
    back = converted(written(name).path, tmp_path / "awq", "awq")
    assert torch.equal(logits(back), logits(written(name).path))
