"""AWQ's files: what is missing or strange in them, and scales in the model's dtype."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from accessory.checkpoint.opening import open_source
from accessory.errors import CheckpointError
from tests.checkpoint.formats.low_bit_models import V, changed, logits


@pytest.mark.parametrize(
    ("name", "change", "stated", "message"),
    [
        ("awq", lambda t: None, {"version": "gemv"}, "version 'gemv' and 4 bits; expected gemm and 4"),
        ("awq", lambda t: t.pop(f"{V}.scales"), {}, f"{V}.scales is missing"),
        ("awq", lambda t: t.update({f"{V}.qzeros": t[f"{V}.qzeros"][:1].clone()}), {}, r"\[1, 8\]; expected \[4, 8\]"),
        ("awq", lambda t: t.update({f"{V}.qweight": t[f"{V}.qweight"][:0].clone()}), {}, "that divides 0 channels"),
        ("awq", lambda t: None, {"quant_method": "awk"}, "'awk', which cannot be read; .* Did you mean 'awq'"),
    ],
)
def test_what_is_missing_or_strange_is_named(written, tmp_path: Path, name: str, change, stated, message: str) -> None:
    """File, key, what was found and what was expected."""
    with pytest.raises(CheckpointError, match=message):
        open_source(changed(written(name), tmp_path / "damaged", change, **stated))


def test_scales_in_bf16_are_taken_where_fp16_has_them(written, tmp_path: Path) -> None:
    """gptqmodel writes AWQ's in the model's dtype; a number that fp16 has not is refused, not rounded."""
    key = f"{V}.scales"
    halves = {key: load_file(written("awq").path / "model.safetensors")[key].bfloat16()}
    first = changed(written("awq"), tmp_path / "bf16", lambda t: t.update(halves))
    second = changed(written("awq"), tmp_path / "fp16", lambda t: t.update({key: halves[key].half()}))
    assert torch.equal(logits(first), logits(second))
    large = {key: torch.full_like(halves[key], 1e6)}
    with pytest.raises(CheckpointError, match=rf"{key} holds BF16 numbers that fp16 does not have"):
        logits(changed(written("awq"), tmp_path / "large", lambda t: t.update(large)))
