"""Tensors read slice by slice, against the same slices of the whole, and what reading them costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from accessory.checkpoint.lazy import (
    HeldTensor,
    LazyTensor,
    SelectedRows,
    ShardedTensor,
    StackedRows,
    first_rows,
    grown_rows,
    summed,
    zeros,
)
from accessory.checkpoint.opening import open_source

RANGES = [(0, 1), (3, 97), (64, 128), (0, 128)]


class Counted(LazyTensor):
    """A tensor in memory that writes down which ranges are read."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.shape, self.dtype = values, tuple(values.shape), "float32"
        self.reads: list[tuple[int | None, int, int]] = []

    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """The range."""
        self.reads.append((dim, start, stop))
        return self.values if dim is None else self.values.narrow(dim, start, stop - start)


def check_every_range(tensor: LazyTensor, whole: Tensor) -> None:
    """Shape, whole and every range of every dimension."""
    assert tensor.shape == tuple(whole.shape)
    assert torch.equal(tensor.read(), whole)
    for dim, size in enumerate(whole.shape):
        for start in range(size):
            for stop in range(start + 1, size + 1):
                assert torch.equal(tensor.read(dim, start, stop), whole.narrow(dim, start, stop - start)), (dim, start)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("bounds", RANGES)
def test_range_is_the_wholes(formats: dict[str, Path], weights, format_name: str, dim: int, bounds) -> None:
    """Ranges of a matrix along both dimensions, odd ones too where no head is cut, in every format."""
    tensors = open_source(formats[format_name]).tensors
    for name in ("layers.1.attention.wv.weight", "layers.0.feed_forward.w2.weight", "tok_embeddings.weight"):
        start, stop = bounds[0], min(bounds[1], weights[name].shape[dim])
        if start < stop:
            found = tensors[name].read(dim, start, stop)
            assert torch.equal(found, weights[name].narrow(dim, start, stop - start)), name


@pytest.mark.parametrize("shard_dim", [0, 1])
def test_sharded_over_uneven_edges(shard_dim: int) -> None:
    """A matrix in three files."""
    whole = torch.arange(54.0).view(6, 9)
    check_every_range(ShardedTensor(list(whole.chunk(3, shard_dim)), shard_dim), whole)


def test_whole_in_every_shard_is_read_once() -> None:
    """Norms and row biases: the first shard's copy is the tensor."""
    check_every_range(ShardedTensor([torch.ones(4), torch.zeros(4)], None), torch.ones(4))


def test_held() -> None:
    """A range is a copy, so that the memory behind it may go."""
    whole = torch.arange(12.0).view(3, 4)
    held = HeldTensor(whole)
    check_every_range(held, whole)
    assert held.dtype == "float32"
    assert held.read(1, 1, 3).is_contiguous()


ROWS = [[5, 0, 3, 3, 1], [2, 3, 4], [4], [0, 4, 1, 5, 2, 3]]


@pytest.mark.parametrize("rows", ROWS)
def test_selected_rows(rows: list[int]) -> None:
    """In any order, of matrices and of vectors; selecting of what was selected."""
    whole = torch.arange(24.0).view(6, 4)
    chosen = torch.tensor(rows)
    check_every_range(SelectedRows(HeldTensor(whole), chosen), whole[chosen])
    check_every_range(SelectedRows(HeldTensor(whole[:, 0]), chosen), whole[chosen, 0])
    again = torch.tensor([0] if len(rows) == 1 else [1, 0])
    twice = HeldTensor(whole).select(chosen).select(again)
    assert isinstance(twice.inner, HeldTensor)
    check_every_range(twice, whole[chosen][again])


def test_selected_rows_read_no_more_than_lies_between() -> None:
    """Of a large file only the span from the first to the last of the wanted rows."""
    inner = Counted(torch.arange(40.0).view(10, 4))
    selected = SelectedRows(inner, torch.tensor([9, 2, 4, 3, 8]))
    selected.read(0, 1, 4)
    assert inner.reads == [(0, 2, 5)]


def test_stacked_rows() -> None:
    """Two matrices whose rows alternate, and one below the other."""
    first, second = torch.arange(8.0).view(4, 2), -torch.arange(1.0, 5.0).view(2, 2)
    places = torch.tensor([0, 1, 3, 4]), torch.tensor([2, 5])
    wanted = torch.stack([first[0], first[1], second[0], first[2], first[3], second[1]])
    check_every_range(StackedRows((HeldTensor(first), HeldTensor(second)), places), wanted)
    below = torch.arange(4), torch.arange(4, 6)
    check_every_range(StackedRows((HeldTensor(first), HeldTensor(second)), below), torch.cat([first, second]))


def test_stacked_rows_undo_selected_ones() -> None:
    """What was taken apart goes together again."""
    whole = torch.arange(24.0).view(6, 4)
    rows = torch.tensor([0, 1, 3, 4]), torch.tensor([2, 5])
    parts = tuple(HeldTensor(whole).select(its) for its in rows)
    check_every_range(StackedRows(parts, rows), whole)


def test_grown_rows() -> None:
    """Rows of added tokens start as the mean of those there were, computed in fp32."""
    whole = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]])
    mean = torch.tensor([[3.0, 3.0]])
    check_every_range(grown_rows(HeldTensor(whole), 5), torch.cat([whole, mean, mean]))
    narrow = torch.full((4000, 1), 1.001, dtype=torch.bfloat16)
    grown = grown_rows(HeldTensor(narrow), 4001).read()
    assert grown.dtype == torch.bfloat16 and torch.equal(grown[-1], narrow[0])


def test_first_rows() -> None:
    """Others are not read where rows are asked for."""
    whole = torch.arange(12.0).view(4, 3)
    check_every_range(first_rows(HeldTensor(whole), 3), whole[:3])
    counted = Counted(whole)
    first_rows(counted, 3).read(0, 1, 3)
    assert counted.reads == [(0, 1, 3)]


def test_zeros() -> None:
    """Where a file leaves out what changes nothing."""
    check_every_range(zeros(3, 4), torch.zeros(3, 4))


def test_summed() -> None:
    """In fp32, however narrow the files are: a difference smaller than bf16's last place still counts."""
    first, second = torch.arange(12.0).view(3, 4), 0.25 * torch.ones(3, 4)
    check_every_range(summed(HeldTensor(first), HeldTensor(second)), first + 0.25)
    narrow = summed(HeldTensor(torch.full((2,), 256.0).bfloat16()), HeldTensor(torch.full((2,), 0.5).bfloat16()))
    assert narrow.read().tolist() == [256.5, 256.5]
    base, change = Counted(first), Counted(second)
    summed(base, change).read(1, 1, 3)
    assert base.reads == change.reads == [(1, 1, 3)]


def resident() -> int:
    """Bytes of this process in memory, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_a_slice_does_not_read_the_whole(tmp_path: Path, kind: str) -> None:
    """2 MiB out of a matrix of 128 MiB bring less than 16 MiB into memory; the whole brings all, so it is seen."""
    state = {"tok_embeddings.weight": torch.ones(16384, 2048)}
    if kind == "pth":
        torch.save(state, tmp_path / "consolidated.00.pth")
    else:
        save_file(state, tmp_path / "model.safetensors")
    del state
    before = resident()
    tensor = open_source(tmp_path).tensors["tok_embeddings.weight"]
    assert tensor.read(0, 4096, 4352).sum() == 256 * 2048
    assert resident() - before < 16 << 20
    assert tensor.read().sum() == 16384 * 2048
    assert resident() - before > 100 << 20
