"""llama2.c's `.bin` files of fp32 weights: the first format, without a version, and version 1."""

from __future__ import annotations

import math
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from accessory.checkpoint.lazy import HeldTensor
from accessory.checkpoint.naming import Tensors
from accessory.checkpoint.source import Source
from accessory.errors import CheckpointError
from accessory.model.args import ModelArgs

_MAGIC = 0x616B3432  # "ak42"
_SIZES = struct.Struct("<7i")
_VERSIONED = struct.Struct("<Ii7iB")
_PADDED_HEADER = 256
_LIMITS = (2**17, 2**20, 2**10, 2**10, 2**10, 2**22, 2**24)
"""What each number of a header may reach; anything above is another kind of file."""
_FIRST = ("tok_embeddings", "attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3", "norm", "freqs")
_VERSION_1 = ("attention_norm", "ffn_norm", "norm", "tok_embeddings", "wq", "wk", "wv", "wo", "w1", "w2", "w3")
_MODULES = {name: f"attention.{name}" for name in ("wq", "wk", "wv", "wo")} | {
    name: f"feed_forward.{name}" for name in ("w1", "w2", "w3")
}
_OUTER = ("tok_embeddings", "norm", "output")


@dataclass(frozen=True)
class _Header:
    """Numbers of a header. tied: whether the head is the embedding. order: of the arrays. start: where they begin."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    max_seq_len: int
    tied: bool
    order: tuple[str, ...]
    start: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Arrays in the order of the file; the first dimension of those in the blocks is the block."""
        dim, blocks, head = self.dim, self.n_layers, self.dim // self.n_heads
        known = {
            "tok_embeddings": (self.vocab_size, dim),
            "attention_norm": (blocks, dim),
            "ffn_norm": (blocks, dim),
            "wq": (blocks, dim, dim),
            "wk": (blocks, self.n_kv_heads * head, dim),
            "wv": (blocks, self.n_kv_heads * head, dim),
            "wo": (blocks, dim, dim),
            "w1": (blocks, self.hidden_dim, dim),
            "w2": (blocks, dim, self.hidden_dim),
            "w3": (blocks, self.hidden_dim, dim),
            "norm": (dim,),
            "freqs": (2, self.max_seq_len, head // 2),
            "output": (self.vocab_size, dim),
        }
        return {name: known[name] for name in (*self.order, *(() if self.tied else ("output",)))}

    def size(self) -> int:
        """Bytes of the whole file."""
        return self.start + 4 * sum(math.prod(shape) for shape in self.shapes().values())


def is_llama2c(path: Path) -> bool:
    """Whether a file begins as llama2.c's do: with its mark, or with seven numbers that describe a model."""
    with path.open("rb") as file:
        head = file.read(_SIZES.size)
    if head[:4] == struct.pack("<I", _MAGIC):
        return True
    return len(head) == _SIZES.size and _describes_model(_SIZES.unpack(head))


def _describes_model(numbers: tuple[int, ...]) -> bool:
    sizes = (*numbers[:5], abs(numbers[5]), numbers[6])
    if not all(1 <= size <= limit for size, limit in zip(sizes, _LIMITS, strict=True)):
        return False
    dim, _, _, heads, kv_heads, _, _ = numbers
    return dim % (2 * heads) == 0 and heads % kv_heads == 0


def open_llama2c(path: Path) -> Source:
    """Open a file for which `is_llama2c` holds, memory-mapped.

    Raises `CheckpointError` for another version, and for a file that is not exactly as long as its header says.
    """
    header = _read_header(path)
    found = path.stat().st_size
    if found != header.size():
        raise CheckpointError(
            f"{path}: has {found:,} bytes; its header asks for {header.size():,}. It may be cut short or damaged."
        )
    sizes = {name: value for name, value in asdict(header).items() if name in ModelArgs.model_fields}
    args = ModelArgs(**sizes, tie_word_embeddings=header.tied)
    return Source(path, "llama2.c", [path], _tensors(path, header), settings=args.model_dump(), llama_type="llama")


def _read_header(path: Path) -> _Header:
    with path.open("rb") as file:
        head = file.read(_PADDED_HEADER)
    if head[:4] != struct.pack("<I", _MAGIC):
        *sizes, vocabulary, longest = _SIZES.unpack(head[: _SIZES.size])
        return _Header(*sizes, abs(vocabulary), longest, vocabulary > 0, _FIRST, _SIZES.size)
    if len(head) < _PADDED_HEADER:
        raise CheckpointError(f"{path}: has {len(head)} bytes, less than a header of llama2.c. It is cut short.")
    _, version, *numbers, shared = _VERSIONED.unpack(head[: _VERSIONED.size])
    if version != 1:
        raise CheckpointError(
            f"{path}: is of version {version} of llama2.c's format (2 is int8); expected fp32, version 0 or 1."
        )
    if not _describes_model(tuple(numbers)) or numbers[5] < 0:
        raise CheckpointError(f"{path}: its header says {numbers}, which does not describe a model.")
    return _Header(*numbers, bool(shared), _VERSION_1, _PADDED_HEADER)


def _tensors(path: Path, header: _Header) -> Tensors:
    # A private mapping: what is changed in memory never reaches the file.
    numbers = torch.from_file(str(path), shared=False, size=header.size() // 4, dtype=torch.float32)
    tensors: dict[str, Tensor] = {}
    at = header.start // 4
    for name, shape in header.shapes().items():
        array = numbers[at : at + math.prod(shape)].view(shape)
        at += array.numel()
        if name in _OUTER:
            tensors[f"{name}.weight"] = array
        elif name != "freqs":
            module = _MODULES.get(name, name)
            tensors |= {f"layers.{i}.{module}.weight": block for i, block in enumerate(array)}
    return {name: HeldTensor(tensor) for name, tensor in tensors.items()}
