"""The buffer that matrices are unpacked into one after the other."""

from __future__ import annotations

import pytest
import torch

from accessory.quant import workspace
from accessory.quant.workspace import unpack_buffer, unpack_buffer_bytes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By other tests."""
    monkeypatch.setattr(workspace, "_pieces", {})


def buffer(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """A matrix's."""
    return unpack_buffer(torch.Size(shape), dtype, CPU)


def test_one_piece_for_all() -> None:
    """Each stands behind the last, until one no longer fits; a larger one replaces it; another dtype has its own."""
    first = buffer(30, 40)
    assert first.shape == (30, 40) and first.dtype == torch.float16 and first.is_contiguous()
    assert buffer(7, 9).data_ptr() == first.data_ptr() + 2432
    third = first.data_ptr() + 2432 + 128  # 2,400 and 126 bytes, and what makes them multiples of 64
    assert [buffer(30, 40).data_ptr() for _ in range(15)] == [*(third + 2432 * i for i in range(14)), first.data_ptr()]
    assert buffer(7, 9, dtype=torch.float32).data_ptr() != first.data_ptr()
    larger = buffer(3000, 400)
    assert larger.shape == (3000, 400)
    assert buffer(30, 40).data_ptr() == larger.data_ptr() + larger.nbytes


def test_size_is_what_the_plan_counts() -> None:
    """Sixteen of a small matrix, 32 MiB of larger ones, one of a large one; on a GPU one."""
    for shape, size in (((10, 64), 16 * 1280), ((2048, 1024), 32 << 20), ((5000, 4000), 40_000_000)):
        buffer(*shape)
        assert (
            workspace._pieces[CPU, torch.float16].memory.nbytes
            == size
            == unpack_buffer_bytes(2 * shape[0] * shape[1], CPU)
        )
        assert unpack_buffer_bytes(2 * shape[0] * shape[1], torch.device("cuda")) == 2 * shape[0] * shape[1]


def test_a_large_matrix_alone_is_written_over() -> None:
    """Nothing is behind it."""
    assert buffer(5000, 4000).data_ptr() == buffer(5000, 4000).data_ptr() == buffer(5000, 4000).data_ptr()


def test_training_writes_into_what_generation_asked_for() -> None:
    """A tensor that is made in inference mode could not be written to outside."""
    with torch.inference_mode():
        asked = buffer(5000, 1000, dtype=torch.float64)
    assert not asked.is_inference()
    torch.mul(torch.ones(5000, 1000), 2, out=buffer(5000, 1000, dtype=torch.float64))
    assert (asked == 2).all()
