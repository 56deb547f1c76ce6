"""Whole numbers of a few bits in int32 words, as files of GPTQ, AWQ and GreenBit hold them, and as our codes.

A word's lowest bits come first, and a number may begin in one word and end in the next.
"""

from __future__ import annotations

import torch
from torch import Tensor


def numbers_of(words: Tensor, bits: int) -> Tensor:
    """The numbers that run down each column of `words` (int32 [R, N]): uint8 [N, 32 R / bits]."""
    octets = words.t().contiguous().view(torch.uint8).unflatten(1, (-1, bits))
    found = octets.new_empty((*octets.shape[:2], 8))
    for i in range(8):  # eight numbers fill as many bytes as each has bits
        byte, shift = divmod(bits * i, 8)
        number = octets[:, :, byte] >> shift
        if shift + bits > 8:
            number |= octets[:, :, byte + 1] << (8 - shift)
        found[:, :, i] = number & ((1 << bits) - 1)
    return found.flatten(1)


def words_of(numbers: Tensor, bits: int) -> Tensor:
    """The inverse of `numbers_of`: uint8 [N, K] -> int32 [K bits / 32, N], where K bits is a multiple of 32."""
    octets = numbers.unflatten(1, (-1, 8))
    found = octets.new_zeros((*octets.shape[:2], bits))
    for i in range(8):
        byte, shift = divmod(bits * i, 8)
        found[:, :, byte] |= octets[:, :, i] << shift
        if shift + bits > 8:
            found[:, :, byte + 1] |= octets[:, :, i] >> (8 - shift)
    return found.flatten(1).view(torch.int32).t().contiguous()
