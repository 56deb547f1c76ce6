"""Tensors read slice by slice, against the same slices of the whole, and what reading them costs."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from accessory.checkpoint.lazy import LazyTensor, ShardedTensor
from accessory.checkpoint.opening import open_source

RANGES = [(0, 1), (3, 97), (64, 128), (0, 128)]


class Known(LazyTensor):
    """A tensor in memory."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.shape = values, tuple(values.shape)

    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        return self.values if dim is None else self.values.narrow(dim, start, stop - start)


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
    """Every range of every dimension of a matrix in three files."""
    whole = torch.arange(54.0).view(6, 9)
    sharded = ShardedTensor(list(whole.chunk(3, shard_dim)), shard_dim)
    assert sharded.shape == (6, 9)
    assert torch.equal(sharded.read(), whole)
    for dim, size in enumerate(sharded.shape):
        for start in range(size):
            for stop in range(start + 1, size + 1):
                assert torch.equal(sharded.read(dim, start, stop), whole.narrow(dim, start, stop - start))


def test_whole_in_every_shard_is_read_once() -> None:
    """Norms and row biases: the first shard's copy is the tensor."""
    norm = ShardedTensor([torch.ones(4), torch.zeros(4)], None)
    assert norm.shape == (4,)
    assert torch.equal(norm.read(), torch.ones(4))


def test_interleaved_rows_undo_transformers_permutation() -> None:
    """transformers' own formula there (`permute` of its LLaMA conversion), ours back; weights, biases, and slices."""
    heads, width, columns = 4, 8, 6
    meta = torch.arange(float(heads * width * columns)).view(heads * width, columns)
    theirs = meta.view(heads, width // 2, 2, columns).transpose(1, 2).reshape(heads * width, columns)
    assert not torch.equal(theirs, meta)
    ours = InterleavedRows(Known(theirs), heads)
    assert ours.shape == (32, 6)
    assert torch.equal(ours.read(), meta)
    assert torch.equal(ours.read(0, 16, 32), meta[16:])
    assert torch.equal(ours.read(1, 2, 5), meta[:, 2:5])
    assert torch.equal(InterleavedRows(Known(theirs[:, 0]), heads).read(), meta[:, 0])


def decode_q8_0(blocks: bytes) -> list[float]:
    """32 weights in 34 bytes: a half-precision scale, then signed bytes (ggml's block_q8_0)."""
    return [scale * code for scale, *codes in struct.iter_unpack("<e32b", blocks) for code in codes]


def decode_q4_1(blocks: bytes) -> list[float]:
    """32 weights in 20 bytes: scale, minimum, 16 low nibbles, then 16 high ones (ggml's block_q4_1)."""
    return [
        scale * code + least
        for scale, least, codes in struct.iter_unpack("<ee16s", blocks)
        for code in [*(byte & 15 for byte in codes), *(byte >> 4 for byte in codes)]
    ]


@pytest.mark.parametrize(("kind", "decode", "error"), [("Q8_0", decode_q8_0, 0.01), ("Q4_1", decode_q4_1, 0.1)])
def test_gguf_blocks(tmp_path: Path, weights, write_gguf, kind: str, decode, error: float) -> None:
    """Quantized blocks decode to what their definition says, whole, by rows, and by columns."""
    tensor = open_source(write_gguf(tmp_path / "a.gguf", weights, kind)).tensors["layers.0.feed_forward.w1.weight"]
    expected = torch.tensor(decode(tensor.tensor.data.tobytes())).view(256, 128)
    found = tensor.read()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    original = weights["layers.0.feed_forward.w1.weight"]
    assert 0 < (found - original).norm() / original.norm() < error
    assert torch.equal(tensor.read(0, 5, 200), found[5:200])
    assert torch.equal(tensor.read(1, 32, 96), found[:, 32:96])


def test_gguf_half_precision(tmp_path: Path, weights, write_gguf) -> None:
    """F16 is read exactly, and does not lend out the file's read-only memory."""
    tensors = open_source(write_gguf(tmp_path / "a.gguf", weights, "F16")).tensors
    for name, weight in weights.items():
        assert torch.equal(tensors[name].read().float(), weight.half().float() if weight.dim() == 2 else weight)
    tensors["norm.weight"].read().zero_()


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
