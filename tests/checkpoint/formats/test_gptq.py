"""GPTQ's files: what is missing or strange in them, and biases of zeros."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accessory.checkpoint.opening import open_source
from accessory.errors import CheckpointError
from tests.checkpoint.formats.low_bit_models import V, changed, logits

SHORT = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "change", "stated", "message"),
    [
        ("gptq-4", lambda t: t.pop(f"{V}.qzeros"), {}, rf"{V}.qzeros is missing; found .*{V}.scales"),
        ("gptq-4", lambda t: t.pop(f"{V}.g_idx"), {"desc_act": True}, f"{V}.g_idx is missing; expected it, or bits"),
        (
            "gptq-4",
            lambda t: t.update({f"{V}.g_idx": t[f"{V}.g_idx"] + 9}),
            {},
            "names groups 9 to 10; expected 0 to 1",
        ),
        ("gptq-4", lambda t: t[f"{V}.g_idx"][:3].fill_(1), {}, "has groups of unequal sizes; expected 67 channels"),
        (
            "gptq-4",
            lambda t: t.update({f"{V}.scales": SHORT}),
            {},
            r"v_proj.scales is I32 \[2\]; expected F16 of 2 dim",
        ),
        (
            "gptq-4",
            lambda t: t.update({f"{V}.g_idx": t[f"{V}.g_idx"][:64].clone()}),
            {},
            "numbers of 8.0 bits; expected 2",
        ),
        ("gptq-4", lambda t: None, {"checkpoint_format": "marlin"}, "'marlin'; expected one of gptq, gptq_v2"),
    ],
)
def test_what_is_missing_or_strange_is_named(written, tmp_path: Path, name: str, change, stated, message: str) -> None:
    """File, key, what was found and what was expected."""
    with pytest.raises(CheckpointError, match=message):
        open_source(changed(written(name), tmp_path / "damaged", change, **stated))


def test_biases_of_zeros_are_left_out_and_others_kept(written, tmp_path: Path) -> None:
    """AutoGPTQ wrote zeros for linears without a bias; numbers other than zeros would be lost, and are refused."""
    bias = torch.zeros(128, dtype=torch.float16)
    path = changed(written("gptq-4"), tmp_path / "zeros", lambda t: t.update({f"{V[:-6]}o_proj.bias": bias}))
    assert torch.equal(logits(path), logits(written("gptq-4").path))
    path = changed(written("gptq-4"), tmp_path / "ones", lambda t: t.update({f"{V[:-6]}o_proj.bias": bias + 1}))
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.wo\.bias has no place in this model"):
        logits(path)
