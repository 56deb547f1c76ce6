"""What every packed matrix offers, whatever its format."""

from __future__ import annotations

import pytest
import torch

from accessory.errors import ConfigError
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
        assert torch.equal(packed.borrow(dtype), packed.unpack(dtype))
    assert torch.equal(packed.borrow(torch.float64), packed.unpack(torch.float32).double())


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
