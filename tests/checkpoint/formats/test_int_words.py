"""Numbers of a few bits in int32 words, against Python's integers of any length."""

from __future__ import annotations

import pytest
import torch

from accessory.checkpoint.formats.int_words import numbers_of, words_of


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_numbers_run_down_the_columns(bits: int) -> None:
    """Each column of words is one integer, lowest bits first, also where a number ends in another word; and back."""
    generator = torch.Generator().manual_seed(bits)
    words = torch.randint(-(2**31), 2**31, (2 * bits, 5), generator=generator).int()
    words[0] = torch.tensor([-1, 0, 1, -(2**31), 2**31 - 1])
    found = numbers_of(words, bits)
    for column, numbers in zip(words.t().tolist(), found.tolist(), strict=True):
        whole = sum((word % 2**32) << 32 * place for place, word in enumerate(column))
        assert numbers == [whole >> bits * i & 2**bits - 1 for i in range(64)]
    assert found.dtype == torch.uint8 and torch.equal(words_of(found, bits), words)
