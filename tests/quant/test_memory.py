"""Memory lent to one matrix after the other."""

from __future__ import annotations

import torch

from accessory.quant.memory import shared_memory

CPU = torch.device("cpu")


def test_one_piece_for_all() -> None:
    """Smaller ones overlap it; a larger one replaces it; another dtype has its own."""
    first = shared_memory(torch.Size((30, 40)), torch.float16, CPU)
    assert first.shape == (30, 40) and first.dtype == torch.float16 and first.is_contiguous()
    assert shared_memory(torch.Size((7, 9)), torch.float16, CPU).data_ptr() == first.data_ptr()
    assert shared_memory(torch.Size((7, 9)), torch.float32, CPU).data_ptr() != first.data_ptr()
    larger = shared_memory(torch.Size((3000, 400)), torch.float16, CPU)
    assert larger.shape == (3000, 400)
    assert shared_memory(torch.Size((30, 40)), torch.float16, CPU).data_ptr() == larger.data_ptr()


def test_training_writes_into_what_generation_asked_for() -> None:
    """A tensor that is made in inference mode could not be written to outside."""
    with torch.inference_mode():
        asked = shared_memory(torch.Size((5000, 300)), torch.float64, CPU)
    assert not asked.is_inference()
    torch.mul(torch.ones(5000, 300), 2, out=shared_memory(torch.Size((5000, 300)), torch.float64, CPU))
    assert (asked == 2).all()
