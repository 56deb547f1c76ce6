"""Parameters by name and their gradients, in one process; over two ranks: worker.py, and tests/optim_worker.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from accessory.parallel import groups
from accessory.parallel.parameters import NamedParameters
from accessory.parallel.tensor import Slicing
from tests.parallel.four_parameters import SLICINGS, four_parameters


@pytest.fixture(scope="module", autouse=True)
def layout() -> Iterator[groups.Layout]:
    """This process alone, on the CPU."""
    yield groups.start("cpu")
    groups.stop()


@pytest.fixture
def parameters() -> NamedParameters:
    """Four parameters with gradients."""
    return NamedParameters(four_parameters(), SLICINGS)


def test_a_part_of_them_is_in_the_same_order(parameters: NamedParameters) -> None:
    """Of the same parameters."""
    assert list(parameters) == list(SLICINGS) and len(parameters) == 4
    part = parameters.only({"d", "b.weight", "other"})
    assert list(part) == ["b.weight", "d"] and part["d"] is parameters["d"] and "a.weight" not in part


def test_gathering_is_in_the_order_of_names() -> None:
    """All ranks must meet at the same tensor, however their dictionaries are ordered."""
    slicings = {"a": Slicing(dim=0), "b": Slicing()}
    parameters = NamedParameters({name: nn.Parameter(torch.ones(1)) for name in "ba"}, slicings)
    assert [name for name, _ in parameters.gathered()] == ["a", "b"]
    assert dict(parameters.gathered({"b": torch.zeros(2)})).keys() == {"b"}


def test_gradient_norm_is_that_of_the_whole(parameters: NamedParameters) -> None:
    """Sliced, partial and whole parameters each count once; one without a gradient does not."""
    flat = torch.cat([p.grad.flatten() for p in parameters.values()])
    torch.testing.assert_close(parameters.gradient_norm(), flat.norm())
    parameters["a.weight"].grad = None
    flat = torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None])
    torch.testing.assert_close(parameters.gradient_norm(), flat.norm())
    for parameter in parameters.values():
        parameter.grad = None
    assert parameters.gradient_norm() == 0


def test_gradient_norm_of_shards_and_overflow(parameters: NamedParameters) -> None:
    """A shard may be empty on a rank; what is not finite shows."""
    parameters["d"].grad = torch.randn(4, 6)
    empty = nn.Parameter(torch.zeros(0, 6))
    empty.grad = torch.zeros(0, 6)
    more = NamedParameters({**parameters, "empty": empty}, {**SLICINGS, "empty": Slicing()})
    assert more.gradient_norm().isfinite()
    parameters["d"].grad[0, 0] = float("inf")
    assert more.gradient_norm().isinf()


def test_scaling_and_summing(parameters: NamedParameters) -> None:
    """In place; one rank has nothing to sum, and a missing gradient is no hindrance."""
    before = {name: p.grad.clone() for name, p in parameters.items()}
    parameters["d"].grad = None
    parameters.sum_partial_gradients()
    parameters.scale_gradients(0.5)
    assert all(torch.equal(parameters[name].grad, before[name] * 0.5) for name in SLICINGS if name != "d")
    parameters.scale_gradients(1.0)
    assert torch.equal(parameters["a.weight"].grad, before["a.weight"] * 0.5)
    parameters.scale_gradients(2.0)
    assert torch.equal(parameters["a.weight"].grad, before["a.weight"])
    parameters.only({"d"}).scale_gradients(0.5)
    assert parameters["d"].grad is None
