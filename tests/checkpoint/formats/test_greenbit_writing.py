"""Writing GreenBit's files: zeros that fp16 rounds."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.checkpoint.formats.low_bit_models import converted, logits


def test_zeros_that_fp16_rounds_are_told(written, tmp_path: Path, capfd) -> None:
    """GreenBit's zeros are fp16: whole points times scales are rounded to that, and the weights with them."""
    target = converted(written("gptq-4").path, tmp_path / "greenbit", "greenbit")
    assert "zeros are rounded to fp16, by at most" in capfd.readouterr().out
    expected = logits(written("gptq-4").path)
    assert 0 < (logits(target) - expected).abs().max() < 0.01 * expected.abs().max()
    converted(written("gptq-4-sym").path, tmp_path / "exact", "greenbit")
    assert "rounded" not in capfd.readouterr().out
    assert torch.equal(logits(tmp_path / "exact"), logits(written("gptq-4-sym").path))
