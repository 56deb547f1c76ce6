"""Documents packed in one tensor, as attention kernels take them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from accessory.kernels.shared_prefixes import SharedPrefixes


@dataclass(frozen=True)
class Documents:
    """Documents of `lengths` tokens, the first `shared` of which are packed in the document before it only.

    prefixes: where shared tokens are, or None.
    """

    lengths: tuple[int, ...]
    shared: tuple[int, ...]
    device: torch.device
    prefixes: SharedPrefixes | None

    @staticmethod
    def build(
        lengths: tuple[int, ...], shared: tuple[int, ...] | None = None, device: torch.device | None = None
    ) -> Documents:
        """Of tensors on `device`, the CPU when absent; nothing is shared where `shared` is absent."""
        shared, device = shared or (0,) * len(lengths), device or torch.device("cpu")
        return Documents(lengths, shared, device, SharedPrefixes.build(lengths, shared, device))

    @property
    def keys(self) -> int:
        """Tokens of all documents, those that are shared counted in each."""
        return sum(self.lengths)

    @property
    def rows(self) -> int:
        """Tokens that are packed."""
        return sum(self.lengths) - sum(self.shared)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths, default=0)

    @cached_property
    def offsets(self) -> Tensor:
        """Where each document begins and the last one ends, int32 [B + 1], for variable-length attention kernels."""
        ends = torch.tensor((0, *self.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return ends.to(self.device)

    @cached_property
    def table(self) -> Tensor:
        """A row for each document, the longest first, for the C++ kernel on the CPU, int64 [B, 4].

        Its first key, its tokens, how many of them are shared (their results are not needed), and the row of its first
        query, as if that were packed.
        """
        place = row = 0
        entries = []
        for length, known in zip(self.lengths, self.shared, strict=True):
            entries.append((place, length, known, row - known))
            place += length
            row += length - known
        entries.sort(key=lambda entry: -entry[1])
        return torch.tensor(entries, dtype=torch.int64, device="cpu").view(-1, 4)
