"""What every packed matrix offers, whatever its format."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from accessory.errors import CheckpointError, ConfigError
from accessory.quant import STORAGES, storage
from accessory.quant.packed import PackedWeight

ROWS, COLUMNS = 48, 192


@pytest.fixture(params=sorted(STORAGES))
def format_name(request: pytest.FixtureRequest) -> str:
    """Each storage format in turn."""
    return request.param


@pytest.fixture
def packed(format_name: str) -> PackedWeight:
    """A filled matrix [48, 192]."""
    weight = storage(format_name)((ROWS, COLUMNS))
    weight.pack(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)))
    return weight


def test_borrowed_is_the_matrix(packed: PackedWeight) -> None:
    """The same numbers as unpacked, in any float dtype."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(packed.unpack_to_buffer(dtype), packed.unpack(dtype))
    assert torch.equal(packed.unpack_to_buffer(torch.float64), packed.unpack(torch.float32).double())


def test_frozen(packed: PackedWeight) -> None:
    """Nothing of it is trained."""
    assert not any(parameter.requires_grad for parameter in packed.parameters())


def test_nbytes_is_known_before_filling(format_name: str, packed: PackedWeight) -> None:
    """The empty matrix on the meta device tells the bytes of the filled one, and of its real tensors."""
    empty = storage(format_name)((ROWS, COLUMNS))
    assert all(parameter.is_meta for parameter in empty.parameters())
    real = sum(parameter.untyped_storage().nbytes() for parameter in packed.parameters())
    assert empty.nbytes == packed.nbytes == real
    assert [p.shape for p in empty.parameters()] == [p.shape for p in packed.parameters()]


def test_repr_shows_the_shape(packed: PackedWeight) -> None:
    """`print(model)` says what matrix it stands for."""
    assert "(48, 192)" in repr(packed)


def test_unknown_format_names_the_nearest() -> None:
    """A typing error in --quant_type is met with the right name."""
    with pytest.raises(ConfigError, match=r"'nf44' is not a storage format\. Did you mean 'nf4'"):
        storage("nf44")


def test_docs_list_every_format() -> None:
    """And what a weight of LLaMA's takes in it, in docs/memory.md."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "memory.md").read_text()
    found = dict(re.findall(r"^\| `(\w+)` \|.*\| (\d\.\d+) \|$", page, re.MULTILINE))
    wanted = {name: kind((4096, 4096)).nbytes / 4096**2 for name, kind in STORAGES.items()}
    assert {name: float(size) for name, size in found.items()} == pytest.approx(wanted, abs=6e-4)


@pytest.mark.parametrize("cut", [(0, 8, 24), (1, 64, 128)])
@pytest.mark.parametrize("rows", [None, torch.randperm(48, generator=torch.Generator().manual_seed(1))])
def test_cut_packed_is_cut_unpacked(packed: PackedWeight, rows: torch.Tensor | None, cut: tuple[int, int, int]) -> None:
    """Chosen rows, and ranges of rows or columns of those: the same numbers, in parts of the declared shapes."""
    state = {part: value.detach() for part, value in packed.named_parameters()}
    wanted = packed.unpack(torch.float32)
    wanted = wanted if rows is None else wanted[rows]
    wanted = wanted.narrow(cut[0], cut[1], cut[2] - cut[1])
    ours = packed.of_range(COLUMNS, cut)(tuple(wanted.shape))
    ours.adopt(packed.cut(state, COLUMNS, "w", rows, cut))
    assert torch.equal(ours.unpack(torch.float32), wanted)


def test_a_cut_through_a_block_is_refused(packed: PackedWeight) -> None:
    """Where there are blocks."""
    state = {part: value.detach() for part, value in packed.named_parameters()}
    if packed.PARTS["scales"].block is None:
        assert packed.cut(state, COLUMNS, "w", span=(1, 0, 63))["codes"].shape == (ROWS, 63)
        return
    with pytest.raises(
        CheckpointError, match=r"w: its 192 columns are packed in blocks of (64|8) that cannot be cut at 0:63"
    ):
        packed.cut(state, COLUMNS, "w", span=(1, 0, 63))
