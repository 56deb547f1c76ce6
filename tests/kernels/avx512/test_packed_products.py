"""The memory that products with packed matrices share, whatever their format. What they compute: see each format's."""

from __future__ import annotations

import threading

import pytest
from torch import Tensor, equal

from accessory.kernels.avx512 import packed_products
from accessory.kernels.avx512.four_bit_product import sum_of_products, workspace_bytes
from tests.kernels.avx512.test_four_bit_product import packed, random


def test_what_lies_in_the_workspace_does_not_matter() -> None:
    """It is never cleared."""
    weight, x = packed((100, 192)), random(13, 192).bfloat16()
    found = sum_of_products([x], [weight.as_codes()], transposed=False)
    packed_products._kept.memory.fill_(255)
    assert equal(found, sum_of_products([x], [weight.as_codes()], transposed=False))


@pytest.mark.parametrize("rank", [0, 7, 8])
def test_workspace(rank: int) -> None:
    """As large as is said beforehand, and kept; each of the callers' threads has its own."""
    weight, x = packed((100, 192)), random(481, 192).bfloat16()
    low = (random(481, rank).bfloat16(), random(100, rank), 1.0) if rank else None

    def memory_of_a_call(rows: int) -> Tensor:
        part = None if low is None else (low[0][:rows], *low[1:])
        sum_of_products([x[:rows]], [weight.as_codes()], transposed=False, low=part)
        return packed_products._kept.memory

    def in_a_thread() -> None:
        memory = memory_of_a_call(481)
        found.append((memory.nbytes, memory_of_a_call(480) is memory, memory_of_a_call(4) is memory, memory))

    found, mine = [], memory_of_a_call(481)
    threads = [threading.Thread(target=in_a_thread) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    size = workspace_bytes([(100, 192)], rank, 481, transposed=False)
    assert [entry[:3] for entry in found] == [(size, True, True)] * 2
    assert len({memory.data_ptr() for memory in (mine, *(entry[3] for entry in found))}) == 3
    assert size >= workspace_bytes([(100, 192)], rank, 480, transposed=False)
