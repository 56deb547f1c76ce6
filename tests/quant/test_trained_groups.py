"""accessory/quant/trained_groups.py against autograd in float64."""

from __future__ import annotations

import pytest
import torch

from accessory.model.projection import project
from accessory.quant.groups import group_storage
from accessory.quant.trained_groups import with_trained_statistics


@pytest.mark.parametrize(("bits", "group", "columns"), [(2, 64, 128), (3, 32, 80), (4, 128, 200)])
def test_gradients(bits: int, group: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of x, scales and zeros, made of a few rows at a time; codes are frozen. A last group may be shorter."""
    monkeypatch.setattr("accessory.quant.trained_groups.PIECE", 3 * columns)
    generator = torch.Generator().manual_seed(bits)
    kind = group_storage(bits, group)
    plain = kind((7, columns))
    plain.pack(torch.randn(7, columns, generator=generator))
    weight = with_trained_statistics(kind)((7, columns))
    weight.adopt({name: part.detach() for name, part in plain.named_parameters()})
    assert weight.name == kind.name and weight.trained == ("scales", "zeros") and not weight.codes.requires_grad
    assert torch.equal(weight.unpack(torch.float32), plain.unpack(torch.float32))
    x, dy = torch.randn(9, columns, generator=generator), torch.randn(9, 7, generator=generator)
    x.requires_grad_(True)
    (y,) = project(x, [weight])
    y.backward(dy)
    scales, zeros = (part.detach().double().requires_grad_(True) for part in (weight.scales, weight.zeros))
    of_column = torch.arange(columns) // group
    codes = (plain.unpack(torch.float64) + zeros.detach()[:, of_column]) / scales.detach()[:, of_column]
    matrix = codes.round() * scales[:, of_column] - zeros[:, of_column]
    wide = x.detach().double().requires_grad_(True)
    (wide @ matrix.t()).backward(dy.double())
    assert torch.allclose(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
    assert torch.allclose(weight.scales.grad.double(), scales.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(weight.zeros.grad.double(), zeros.grad, rtol=1e-4, atol=1e-4)
