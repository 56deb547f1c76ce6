"""The key/value cache of generation: preallocated once, filled as documents grow."""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.model.sequences import Sequences


class LayerCache:
    """Keys and values of one layer, each [B, longest document, K / ranks, E] (with ALiBi's channels where it leans)."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def store(self, keys: Tensor, values: Tensor, sequences: Sequences) -> None:
        """Append the new tokens' keys and values [T, K / ranks, E] behind what each document has."""
        begin = 0
        for i, (start, length) in enumerate(zip(sequences.starts, sequences.lengths, strict=True)):
            self.keys[i, start : start + length] = keys[begin : begin + length]
            self.values[i, start : start + length] = values[begin : begin + length]
            begin += length
