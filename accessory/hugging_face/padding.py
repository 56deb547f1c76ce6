"""Between batches as transformers has them, rows [B, S] with padding, and packed documents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.data.batch import IGNORE
from accessory.errors import DataError


@dataclass(frozen=True)
class PaddedRows:
    """Where the tokens of a batch are: mask, bool [B, S], and the number of them in each row that has any."""

    mask: Tensor
    lengths: tuple[int, ...]

    @staticmethod
    def of(input_ids: Tensor, attention_mask: Tensor | None) -> PaddedRows:
        """attention_mask: [B, S], 0 at padding, which may be on either side; None: there is none.

        Raises `DataError` for other shapes, a row with padding between its tokens, and a batch of padding only.
        """
        if input_ids.dim() != 2:
            raise DataError(f"input_ids has shape {tuple(input_ids.shape)}; expected [rows, tokens].")
        mask = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            mask = _like(input_ids, attention_mask, "attention_mask") != 0
        begins = F.pad(mask, (1, 0))
        broken = (begins[:, 1:] & ~begins[:, :-1]).sum(1) > 1
        if broken.any():
            raise DataError(f"attention_mask: row {int(broken.nonzero()[0])} has padding between its tokens.")
        lengths = tuple(length for length in mask.sum(1).tolist() if length)
        if not lengths:
            raise DataError(f"A batch of shape {tuple(input_ids.shape)} holds no token: all of it is padding.")
        return PaddedRows(mask, lengths)

    def packed(self, values: Tensor) -> Tensor:
        """Of values [B, S] those of tokens [T], row after row."""
        return values[self.mask]

    def padded(self, values: Tensor) -> Tensor:
        """Values of tokens [T, N] -> [B, S, N], zero at padding."""
        if len(values) == self.mask.numel():
            return values.view(*self.mask.shape, -1)
        return values.new_zeros(*self.mask.shape, values.shape[-1]).index_put((self.mask,), values)

    def next_labels(self, labels: Tensor) -> Tensor:
        """Labels [B, S] of the tokens themselves -> [T], each the next token's; a row's last token has none.

        Raises `DataError` for labels of another shape.
        """
        labels = _like(self.mask, labels, "labels").masked_fill(~self.mask, IGNORE)
        return self.packed(F.pad(labels[:, 1:], (0, 1), value=IGNORE))


def _like(expected: Tensor, found: Tensor, name: str) -> Tensor:
    if found.shape != expected.shape:
        raise DataError(f"{name} has shape {tuple(found.shape)}; expected {tuple(expected.shape)}, that of input_ids.")
    return found
