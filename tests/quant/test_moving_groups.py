"""accessory/quant/moving_groups.py against autograd in float64."""

from __future__ import annotations

import pytest
import torch

from accessory.errors import ParallelError
from accessory.model.projection import project
from accessory.quant.groups import group_storage
from accessory.quant.moving_groups import MovingIntegers, Sketch, Wish, with_moving_integers

ALSO = ("points", "order", "channel_scale")


def matrix(of_columns: bool, statistics: bool, also: tuple[str, ...] = ()) -> MovingIntegers:
    """[6, 64] of 2 bits in groups of 32, with a wish of rank 3."""
    torch.manual_seed(0)
    state = {"codes": torch.randint(0, 256, (6, 16), dtype=torch.uint8), "scales": torch.rand(6, 2).half()}
    parts = {"points": torch.randint(0, 4, (6, 2), dtype=torch.uint8), "order": torch.randperm(64).int(),
             "channel_scale": torch.rand(64).half()}  # fmt: skip
    state |= {part: parts[part] for part in also} if also else {"zeros": torch.rand(6, 2).half()}
    weight = with_moving_integers(group_storage(2, 32, also), statistics)((6, 64))
    weight.keep_wish(Wish(3, of_columns, scale=0.25))
    weight.adopt(state)
    with torch.no_grad():
        weight.displacement.normal_()
        weight.basis.copy_(torch.linalg.qr(torch.randn(weight.basis.shape))[0])
    return weight


@pytest.mark.parametrize("of_columns", [True, False])
@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("also", [(), ALSO])
def test_gradients(of_columns: bool, statistics: bool, also: tuple[str, ...]) -> None:
    """Of the displacement: as if it were added to the packed columns; the product does not have it."""
    weight = matrix(of_columns, statistics, also)
    assert weight.moved == ("codes",) and weight.filed is group_storage(2, 32, also[statistics:])
    x, dy = torch.randn(9, 64), torch.randn(9, 6)
    (y,) = project(x, [weight])
    assert torch.allclose(y, x @ weight.unpack(torch.float32).t(), atol=1e-5)
    y.backward(dy)
    wide, basis = weight.displacement.detach().double().requires_grad_(True), weight.basis.double()
    added = weight.unit * (wide @ basis.t() if of_columns else basis @ wide)
    packed = x.double()
    if also:
        packed = (packed * weight.channel_scale.double())[:, weight.order]
    (packed @ added.t()).backward(dy.double())
    assert torch.allclose(weight.displacement.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
    trained = [name for name in ("scales", "zeros") if statistics]
    assert weight.trained == (*trained, "displacement") and all(getattr(weight, t).grad is not None for t in trained)
    assert weight.unit == pytest.approx(0.25 * weight.scales.float().mean().item(), rel=1e-3)


@pytest.mark.parametrize("of_columns", [True, False])
def test_sketches_add_up(of_columns: bool) -> None:
    """Of two halves of the rows: dW or its transpose, times the test matrix."""
    x, dy = torch.randn(9, 64), torch.randn(9, 6)
    test = torch.randn(6 if of_columns else 64, 3)
    sketch = Sketch(lambda: test)
    for rows in (slice(0, 4), slice(4, 9)):
        sketch.add(x[rows], dy[rows], of_columns)
    dw = dy.double().t() @ x.double()
    assert torch.allclose(sketch.total.double(), (dw.t() if of_columns else dw) @ test.double(), rtol=1e-4, atol=1e-4)


def test_what_only_training_needs_is_absent_elsewhere() -> None:
    """Where no wish is kept, the parts are the file's, and nothing but statistics is trained."""
    weight = with_moving_integers(group_storage(3, 64), True)((4, 128))
    assert [name for name, _ in weight.named_parameters()] == ["codes", "high", "scales", "zeros"]
    assert weight.trained == ("scales", "zeros") and weight.moved == ("codes", "high")


def test_reordered_columns_cannot_be_cut() -> None:
    """Their codes could not be put together again."""
    with pytest.raises(ParallelError, match="--model_parallel_size 2 cuts rows of 64 weights, which lie in an order"):
        with_moving_integers(group_storage(2, 32, ALSO), False).of_range(64, (1, 0, 32))
