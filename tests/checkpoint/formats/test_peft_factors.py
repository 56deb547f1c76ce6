"""Factors made to fit another rank, whole and in every range, against the same made by hand."""

from __future__ import annotations

import torch

from accessory.checkpoint.formats.peft_factors import padded_columns, random_rows, some_columns
from accessory.checkpoint.lazy import HeldTensor
from tests.checkpoint.test_lazy import check_every_range

B = torch.arange(12.0).view(3, 4)


def test_padded_columns() -> None:
    """Ranges within the matrix, within the zeros and across their edge."""
    check_every_range(padded_columns(HeldTensor(B.bfloat16()), 6, 0.5), torch.cat([B / 2, torch.zeros(3, 2)], 1))


def test_some_columns() -> None:
    """Counted from the first of them."""
    check_every_range(some_columns(HeldTensor(B), 1, 3), B[:, 1:3])


def test_random_rows() -> None:
    """The file's rows first; those below depend on the name alone."""
    made = random_rows(HeldTensor(B), (5, 4), "wq")
    check_every_range(made, torch.cat([B, random_rows(None, (5, 4), "wq").read()[3:]]))
    assert made.read()[3:].count_nonzero() == 8
    assert not torch.equal(made.read(), random_rows(HeldTensor(B), (5, 4), "wk").read())
