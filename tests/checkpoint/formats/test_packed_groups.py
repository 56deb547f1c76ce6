"""What packed formats have in common: parts that are taken out of files, codes, statistics and channels by group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accessory.checkpoint.formats import packed_groups
from accessory.checkpoint.formats.packed_groups import INTEGERS, Files
from accessory.checkpoint.lazy import HeldTensor
from accessory.errors import CheckpointError
from accessory.kernels.codes import whole_numbers
from tests.checkpoint.formats.low_bit_files import words

TENSORS = {"a.qweight": HeldTensor(torch.zeros(2, 3, dtype=torch.int32)), "b.bias": HeldTensor(torch.zeros(3))}
FILES = Files(TENSORS, Path("p"))


def test_parts_are_taken_once() -> None:
    """By name, type and dimensions; what is left are the other tensors."""
    files = Files(FILES.tensors, FILES.path)
    assert files.packed() == ["a"] and files.holds("b", "bias") and not files.holds("b", "qweight")
    with pytest.raises(CheckpointError, match=r"p: a.qweight is int32 \[2, 3\]; expected I32 of 1 dimensions"):
        Files(FILES.tensors, FILES.path).take("a", "qweight", INTEGERS, 1)
    assert files.take("a", "qweight", INTEGERS, 2).shape == (2, 3) and list(files.tensors) == ["b.bias"]
    assert list(FILES.tensors) == ["a.qweight", "b.bias"]
    with pytest.raises(CheckpointError, match=r"p: b.qweight is missing; found b.bias"):
        files.take("b", "qweight", INTEGERS, 2)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("ordered", [False, True])
def test_codes_of_words(bits: int, ordered: bool) -> None:
    """The numbers that numpy packed, [N, K], or in another order of channels; shapes are known before they are read."""
    generator = torch.Generator().manual_seed(bits)
    numbers = torch.randint(0, 2**bits, (64, 5), generator=generator)
    order = torch.randperm(64, generator=generator) if ordered else None
    packed = HeldTensor(torch.from_numpy(words(numbers.numpy(), bits).copy()))
    parts = packed_groups.codes_of_words(packed, bits, order)
    read = {name: part.read() for name, part in parts.items()}
    assert {name: part.shape for name, part in parts.items()} == {name: tuple(p.shape) for name, p in read.items()}
    found = whole_numbers(read["codes"], read.get("high"), bits, 64)
    assert torch.equal(found.long(), numbers.t() if order is None else numbers.t()[:, order])


def test_statistics_by_rows() -> None:
    """Turned, in fp16; numbers that fp16 has not, or that are none, are refused by name."""
    scales = torch.tensor([[0.5, 1.5, 2.0], [0.25, -3.0, 0.0]])
    found = packed_groups.by_rows(HeldTensor(scales), "v.scales")
    assert found.shape == (3, 2) and torch.equal(found.read(), scales.t().half())
    assert torch.equal(found.read(0, 1, 2), scales.t().half()[1:2])
    for value, message in ((1e-9, "holds float32 numbers that fp16 does not have"), (torch.inf, "holds inf in 1 of 6")):
        scales[1, 1] = value
        with pytest.raises(CheckpointError, match=f"v.scales {message}"):
            packed_groups.by_rows(HeldTensor(scales), "v.scales").read()


@pytest.mark.parametrize(
    ("index", "order", "group"),
    [
        ([0, 0, 0, 1, 1, 1], None, 3),
        ([0, 0, 0, 0, 1, 1], None, 4),
        ([1, 0, 1, 0, 0, 1], [1, 3, 4, 0, 2, 5], 3),
        ([1, 0, 0, 1, 0, 0], [1, 2, 4, 5, 0, 3], 4),
        ([0, 0, 0, 1, 1, 2], "unequal", 3),
        ([0, 2, 1, 1, 2, 2], "unequal", 3),
    ],
)
def test_channels_by_group(index: list[int], order: list[int] | str | None, group: int) -> None:
    """Channels of a group one after the other, in their own order within it; only the last group may be shorter."""
    if order == "unequal":
        with pytest.raises(
            CheckpointError, match=rf"a.g_idx has groups of unequal sizes; expected {group} channels in"
        ):
            packed_groups.channels_by_group(FILES, "a", torch.tensor(index))
        return
    found, size = packed_groups.channels_by_group(FILES, "a", torch.tensor(index))
    assert size == group and (found is None if order is None else found.tolist() == order)


def test_an_order_that_changes_nothing_is_no_part() -> None:
    assert packed_groups.column_order(torch.arange(6)) == {}
    assert packed_groups.column_order(torch.tensor([1, 0]))["order"].read().tolist() == [1, 0]


def test_widths_that_storages_have() -> None:
    """Others are refused, with what to give instead, unless a format reads them in another way."""
    assert packed_groups.checked_bits(FILES, "a", 3.0) == 3 and packed_groups.checked_bits(FILES, "a", 8.0, 8) == 8
    with pytest.raises(CheckpointError, match=r"a.qweight holds numbers of 8 bits; expected 2, 3, 4 bits, or the full"):
        packed_groups.checked_bits(FILES, "a", 8.0)
