"""What is alive for a moment while a block runs, against what is allocated; and what a GPU's kernel keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from accessory.memory.block_work import BlockWork, normalizing_bytes
from accessory.memory.kept import KeptByBlock
from accessory.model.norm import LayerNorm
from accessory.parallel.groups import Layout
from tests.memory.allocated_peak import AllocatedPeak
from tests.memory.small_models import LORA, SHAPES, SMALL, built, filled

LENGTHS = (300, 200)
NOTHING = KeptByBlock(all=0, input=0, after_attention=0, keeps_input=False, keeps_attended=False)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("inner", [64, 2048])
@pytest.mark.parametrize("shape", [{}, *SHAPES.values()], ids=["LLaMA", *SHAPES])
def test_forward_of_a_frozen_block(layout: Layout, shape: dict, inner: int) -> None:
    """In fp32, whose products need no memory to work in: attention or feed-forward, and what is held."""
    args = SMALL.model_copy(update={"dim": 256, "hidden_dim": inner, "head_dim": 64, "rotary_dim": 64, **shape})
    decoder, _ = filled(layout, {"bias_tuning": False}, quant=None, dtype=torch.float32, args=args)
    block, ids = decoder.layers[0], torch.arange(sum(LENGTHS)) % 96
    with torch.no_grad():
        sequences = decoder.sequences(LENGTHS)
        x = decoder.enter(ids, sequences)
        block(x, sequences)
        with AllocatedPeak() as peak:
            block(x, sequences)
    work = BlockWork(block, LENGTHS, torch.float32, CPU)
    assert work.forward(NOTHING) == pytest.approx(peak.bytes, rel=0.1)
    assert work.forward(replace(NOTHING, held=77)) == work.forward(NOTHING) + 77


@pytest.mark.parametrize("name", ["LLaMA", "BLOOM"])
def test_kept_by_a_gpu(name: str) -> None:
    """Attention's result counts once where `wo` reads it as it is; nothing is kept where nothing goes back."""
    decoder, _ = built(SMALL.model_copy(update=SHAPES.get(name, {})), LORA)
    block, results = decoder.layers[0], sum(LENGTHS) * 4 * 16 * 2
    work, kept = BlockWork(block, LENGTHS, torch.bfloat16, CUDA), KeptByBlock(1000, 0, 0, False, True)
    apart = work.kept(replace(kept, keeps_attended=False)).all
    assert apart - work.kept(kept).all == (results if name == "LLaMA" else 0) and apart >= 1000 + results
    frozen = replace(kept, goes_back=False)
    assert work.kept(frozen) is frozen and BlockWork(block, LENGTHS, torch.bfloat16, CPU).kept(kept) is kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalizing(dtype: torch.dtype) -> None:
    """A result, and two wide copies of what is narrow."""
    norm, x = LayerNorm(256, 1e-5), torch.randn(500, 256).to(dtype)
    norm.to_empty(device="cpu").requires_grad_(False)
    with torch.no_grad(), AllocatedPeak() as peak:
        norm(x)
    assert normalizing_bytes(norm, 500, dtype, CPU) == pytest.approx(peak.bytes, rel=0.05)
