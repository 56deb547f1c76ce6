"""The product with a packed weight: right in both directions, and nothing kept for the backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accessory.errors import ConfigError
from accessory.quant import STORAGES, storage
from accessory.quant.packed import PackedWeight

ROWS, COLUMNS, TOKENS = 48, 192, 7


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


def batch(seed: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random [7, width]."""
    return torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_product_equals_float64(packed: PackedWeight) -> None:
    """y = x W^T and dx = dy W, against the same matrix multiplied in float64."""
    x, dy = batch(1, COLUMNS).requires_grad_(), batch(2, ROWS)
    y = packed(x)
    y.backward(dy)
    matrix = packed.unpack(torch.float32).double()
    torch.testing.assert_close(y.double(), x.detach().double() @ matrix.t(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(x.grad.double(), dy.double() @ matrix, rtol=1e-5, atol=2e-5)


def test_bf16_product_is_close_to_float64(packed: PackedWeight) -> None:
    """In bf16 both directions are within 1 % of the largest value."""
    x, dy = batch(1, COLUMNS, torch.bfloat16).requires_grad_(), batch(2, ROWS, torch.bfloat16)
    y = packed(x)
    y.backward(dy)
    matrix = packed.unpack(torch.float32).double()
    for found, wanted in ((y, x.detach().double() @ matrix.t()), (x.grad, dy.double() @ matrix)):
        assert found.dtype == torch.bfloat16
        assert (found.double() - wanted).abs().max() < 0.01 * wanted.abs().max()


def test_nothing_is_saved(packed: PackedWeight) -> None:
    """Neither x nor the unpacked matrix waits for the backward."""
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        packed(batch(1, COLUMNS).requires_grad_()).sum()
    assert saved == []


def test_backward_reads_the_weight_again(packed: PackedWeight) -> None:
    """Memory given up after the forward and gathered elsewhere, as a sharded base is, still serves the backward."""
    x = batch(1, COLUMNS).requires_grad_()
    y = packed(x)
    wanted = torch.ones(TOKENS, ROWS) @ packed.unpack(torch.float32)
    for parameter in packed.parameters():
        moved = parameter.detach().clone()
        parameter.detach().zero_()
        parameter.data = moved
    y.sum().backward()
    torch.testing.assert_close(x.grad, wanted)


def test_frozen(packed: PackedWeight) -> None:
    """Nothing of it is trained, and an input without gradient makes no graph."""
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    assert not packed(batch(1, COLUMNS)).requires_grad


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
