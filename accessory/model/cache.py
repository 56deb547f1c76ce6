"""The key/value cache of generation: preallocated once, filled as documents grow."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from accessory.model.sequences import Sequences


class LayerCache:
    """Keys and values of one layer, each [B, longest document, K / ranks, E] (E with ALiBi's channels, if any).

    beside: what else belongs to each document, [B, ...] each, by name.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.beside: dict[str, Tensor] = {}

    def store(self, keys: Tensor, values: Tensor, sequences: Sequences) -> None:
        """Append the new tokens' keys and values [T, K / ranks, E] to what each document has."""
        sequences.put(self.keys, keys)
        sequences.put(self.values, values)

    def grow(self, longest: int, used: int) -> None:
        """Make room for documents of `longest` tokens, keeping the first `used` of each."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(len(old), longest, *old.shape[2:])
            new[:, :used] = old[:, :used]
            setattr(self, name, new)

    def copy_first(self, used: int) -> None:
        """Give all documents the first `used` tokens of the first one."""
        self.keys[1:, :used] = self.keys[:1, :used]
        self.values[1:, :used] = self.values[:1, :used]
        for tensor in self.beside.values():
            tensor[1:] = tensor[:1]

    def documents(self, begin: int, end: int) -> LayerCache:
        """The cache of documents [begin, end), in the same memory."""
        part = copy(self)
        part.keys, part.values = self.keys[begin:end], self.values[begin:end]
        part.beside = {name: tensor[begin:end] for name, tensor in self.beside.items()}
        return part

    def keep(self, rows: list[int], longest: int) -> None:
        """Keep only the documents `rows` (ascending), of at most `longest` tokens, and move them to the front."""
        self.move_to_front(rows, longest)
        self.keys, self.values = self.keys[: len(rows)], self.values[: len(rows)]
        self.beside = {name: tensor[: len(rows)] for name, tensor in self.beside.items()}

    def move_to_front(self, rows: list[int], longest: int) -> None:
        """Move the documents `rows` (ascending), of at most `longest` tokens, to the front, overwriting those there."""
        for new, old in enumerate(rows):
            if new != old:
                self.keys[new, :longest] = self.keys[old, :longest]
                self.values[new, :longest] = self.values[old, :longest]
                for tensor in self.beside.values():
                    tensor[new] = tensor[old]
