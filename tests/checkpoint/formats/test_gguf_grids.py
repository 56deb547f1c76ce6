"""Packed matrices written as GGUF: numbers that its types hold stay as they are."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf.quants import dequantize

from accessory.checkpoint.formats import gguf_grids
from accessory.checkpoint.lazy import HeldTensor, PackedTensor
from accessory.export import Destination, open_whole
from accessory.quant.groups import group_storage
from tests.checkpoint.formats.low_bit_models import OURS, TOKENS, logits

THEIRS = dict(zip(OURS, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down", "ffn_up"), strict=True))
"""Their name of a linear -> llama.cpp's."""


@pytest.mark.parametrize(
    ("name", "kinds", "in_f16"),
    [
        ("gptq-4-sym", {Kind.Q4_0}, 0),
        ("gptq-2", {Kind.Q4_0}, 0),
        ("gptq_v2-2-rows", {Kind.Q4_0}, 0),
        ("gptq-4", {Kind.Q4_1, Kind.Q4_0}, 0),
        ("awq", {Kind.Q4_1}, 0),
        ("greenbit-plain", {Kind.Q4_1}, 0),
        ("greenbit-two-levels", {Kind.Q4_1}, 0),
        ("gptq-4-act", {Kind.F16}, 14),
        ("greenbit", {Kind.F16, Kind.Q4_1}, 12),
    ],
)
def test_gguf_keeps_numbers_exactly_or_says_so(written, tmp_path: Path, capfd, name: str, kinds, in_f16: int) -> None:
    """The gguf package unpacks what the packed matrices mean; others are F16, and counted. Rounded zeros are told."""
    made, target = written(name), tmp_path / "model.gguf"
    model, _, _ = open_whole([made.path])
    Destination("gguf", gguf_type="packed").write(model, target)
    out = capfd.readouterr().out
    said = re.search(r"holds (\d+) of 14 packed matrices", out)
    assert (int(said[1]) if said else 0) == in_f16
    rounded = "are rounded to the fp16 of Q4_1" in out
    assert rounded == (name in ("gptq-4", "awq"))
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
        close = 1e-3 if tensor.tensor_type == Kind.F16 or rounded else 1e-6
        assert np.abs(unpacked - weight).max() <= close * np.abs(weight).max(), key
    expected = logits(made.path)
    assert (logits(target) - expected).abs().max() < (1e-2 if in_f16 or rounded else 2e-3) * expected.abs().max()


@pytest.mark.parametrize(
    ("bits", "group", "also", "columns", "kind"),
    [
        (2, 64, (), 128, Kind.Q4_1),
        (3, 32, ("points",), 96, Kind.Q4_0),  # numbers less points need no more than 4 bits
        (4, 64, ("points",), 128, Kind.Q4_1),
        (4, 16, (), 128, None),  # a block has one scale
        (4, 128, (), 48, None),  # a row ends within a block
        (4, 1024, (), 96, Kind.Q4_1),  # one group a row
    ],
)
def test_the_type_that_holds_a_matrix(bits: int, group: int, also: tuple[str, ...], columns: int, kind) -> None:
    """Blocks of 32 columns in each row, of one group each; the package unpacks the same weights."""
    storage = group_storage(bits, group, also)
    matrix = storage((6, columns))
    matrix.pack(torch.randn(6, columns, generator=torch.Generator().manual_seed(0)) + 0.5)
    parts = {name: HeldTensor(part.detach()) for name, part in matrix.named_parameters()}
    if kind == Kind.Q4_1 and also:
        parts["points"] = HeldTensor(torch.zeros_like(matrix.points.detach()))
    tensor = PackedTensor.of(parts, storage, (6, columns), "w")
    assert gguf_grids.kind_of(tensor) == kind and gguf_grids.kind_of(HeldTensor(torch.zeros(6, columns))) is None
    if kind is not None:
        assert gguf_grids.is_rounded(tensor, kind) == (kind == Kind.Q4_1 and bool(also))
        unpacked = dequantize(gguf_grids.encoded(tensor, kind), kind)
        assert np.abs(unpacked - tensor.read().numpy()).max() < 1e-6


@pytest.mark.parametrize("name", ["gptq-4-sym", "gptq-2", "gptq-4", "awq", "greenbit-plain", "gptq-4-act"])
def test_llama_cpp_computes_the_same_packed_model(written, tmp_path: Path, llama_cpp, name: str) -> None:
    """The next token has the probabilities that it has here; llama.cpp rounds activations to 8 bits."""
    target = tmp_path / "model.gguf"
    Destination("gguf", gguf_type="packed").write(open_whole([written(name).path])[0], target)
    expected = logits(written(name).path)[-1].log_softmax(-1)
    answer = llama_cpp.ask(target, prompts=[TOKENS.tolist()])["answers"][0]
    found = torch.tensor(answer["probabilities"]).log()
    assert (found - expected).norm() < 0.06 * (expected - expected.mean()).norm()
