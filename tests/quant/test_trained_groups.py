"""accessory/quant/trained_groups.py against autograd in float64."""

from __future__ import annotations

import pytest
import torch

from accessory.model.projection import project
from accessory.quant.groups import group_storage
from accessory.quant.trained_groups import with_trained_scales, with_trained_statistics


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


def test_gradients_of_reordered_channels() -> None:
    """As GPTQ's and AWQ's directories may have them: in an order, with scaled channels and whole zero points."""
    kind = group_storage(4, 32, ("points", "order", "channel_scale"))
    state = {"codes": torch.randint(0, 256, (7, 32), dtype=torch.uint8), "scales": torch.rand(7, 2).half(),
             "points": torch.randint(0, 16, (7, 2), dtype=torch.uint8), "order": torch.randperm(64).int(),
             "channel_scale": torch.rand(64).half()}  # fmt: skip
    weight, plain = with_trained_statistics(kind)((7, 64)), kind((7, 64))
    weight.adopt(state)
    plain.adopt(state)
    assert torch.allclose(weight.unpack(torch.float32), plain.unpack(torch.float32), atol=1e-6)
    x, dy = torch.randn(9, 64), torch.randn(9, 7)
    project(x, [weight])[0].backward(dy)
    for name in ("scales", "zeros"):
        part = getattr(weight, name)
        for row, group in ((0, 0), (6, 1)):
            slope, here = 0.0, part.detach()[row, group].item()
            for sign in (1, -1):
                with torch.no_grad():
                    part[row, group] = here + sign
                slope += sign / 2 * (x @ weight.unpack(torch.float32).t() * dy).sum().item()
            with torch.no_grad():
                part[row, group] = here
            assert abs(part.grad[row, group].item() - slope) < 1e-3 * max(abs(slope), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_alone_are_trained_where_points_are_whole(dtype: torch.dtype) -> None:
    """Gradients are autograd's of (codes - points) * scales, by every kernel; points stay whole numbers."""
    generator = torch.Generator().manual_seed(0)
    kind = group_storage(3, 32, ("points",))
    plain = kind((7, 80))
    plain.pack(torch.randn(7, 80, generator=generator))
    weight = with_trained_scales(kind)((7, 80))
    weight.adopt({name: part.detach() for name, part in plain.named_parameters()})
    assert weight.trained == ("scales",) and weight.scales.dtype == torch.float32 and weight.filed is kind
    assert torch.equal(weight.points, plain.points) and not weight.points.requires_grad
    assert torch.equal(weight.unpack(torch.float32), plain.unpack(torch.float32))
    x, dy = (torch.randn(9, size, generator=generator).to(dtype) for size in (80, 7))
    (y,) = project(x.requires_grad_(True), [weight])
    y.backward(dy)
    scales, of_column = weight.scales.detach().double().requires_grad_(True), torch.arange(80) // 32
    offsets = (plain.unpack(torch.float64) / scales.detach()[:, of_column]).round()
    wide = x.detach().double().requires_grad_(True)
    expected = wide @ (offsets * scales[:, of_column]).t()
    expected.backward(dy.double())
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 0.2}
    for found, wanted in ((y, expected), (x.grad, wide.grad), (weight.scales.grad, scales.grad)):
        assert torch.allclose(found.double(), wanted, **close)
