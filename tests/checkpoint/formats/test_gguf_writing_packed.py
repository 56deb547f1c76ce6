"""Packed matrices written as GGUF: numbers that its types hold stay as they are."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf.quants import dequantize

from accessory.export import Destination, open_whole
from tests.checkpoint.formats.low_bit_models import OURS, logits

THEIRS = dict(zip(OURS, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down", "ffn_up"), strict=True))
"""Their name of a linear -> llama.cpp's."""


@pytest.mark.parametrize(
    ("name", "kinds", "in_f16"),
    [
        ("gptq-4-sym", {Kind.Q4_0}, 0),
        ("gptq-2", {Kind.Q4_0}, 0),
        ("gptq_v2-2-rows", {Kind.Q4_0}, 0),
        ("gptq-4", {Kind.Q8_0, Kind.Q4_0}, 0),
        ("awq", {Kind.Q8_0}, 0),
        ("greenbit-plain", {Kind.Q4_1}, 0),
        ("greenbit-two-levels", {Kind.Q4_1}, 0),
        ("gptq-4-act", {Kind.F16}, 14),
        ("greenbit", {Kind.F16, Kind.Q4_1}, 12),
    ],
)
def test_gguf_keeps_numbers_exactly_or_says_so(written, tmp_path: Path, capfd, name: str, kinds, in_f16: int) -> None:
    """The gguf package unpacks to the bit what the packed matrices mean; others are F16, and counted."""
    made, target = written(name), tmp_path / "model.gguf"
    model, _, _ = open_whole([made.path])
    Destination("gguf", gguf_type="packed").write(model, target)
    said = re.search(r"holds (\d+) of 14 packed matrices exactly", capfd.readouterr().out)
    assert (int(said[1]) if said else 0) == in_f16
    tensors = {tensor.name: tensor for tensor in GGUFReader(target).tensors}
    rotated = ("self_attn.q_proj", "self_attn.k_proj")  # their rows lie in llama.cpp's order: the logits tell
    linears = {
        f"model.layers.{i}.{theirs}": tensors[f"blk.{i}.{THEIRS[theirs]}.weight"]
        for i in range(2)
        for theirs in OURS
        if theirs not in rotated
    }
    assert {tensor.tensor_type for tensor in linears.values()} <= kinds
    for key, tensor in linears.items():
        weight = made.linears[key].dequantized() * made.channel_scales.get(key, np.float32(1))
        unpacked = dequantize(tensor.data, tensor.tensor_type)
        close = 1e-3 if tensor.tensor_type == Kind.F16 else 1e-6
        assert np.abs(unpacked - weight).max() <= close * np.abs(weight).max(), key
    expected = logits(made.path)
    assert (logits(target) - expected).abs().max() < (1e-2 if in_f16 else 2e-3) * expected.abs().max()
