"""LoRA's factors, cast and joined: on a GPU once for all, on a CPU as they are. This CPU stands for a GPU here."""

from __future__ import annotations

import pytest
import torch

from accessory.kernels.addition import NOTHING, Addition
from accessory.model import lora_factors
from accessory.model.lora_factors import constant_factors, factor_bytes, factors_of
from accessory.model.projection import project


def added(dropout: float = 0.0) -> Addition:
    """LoRA of rank 4 on a matrix [6, 8]."""
    return Addition(None, torch.randn(4, 8), torch.randn(6, 4), 0.5, dropout, 0)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the factors were there."""
    monkeypatch.setattr(lora_factors, "_on_gpu", lambda additions: any(one.b is not None for one in additions))


def test_on_a_cpu_they_stay_as_they_are() -> None:
    additions = [added(), NOTHING, added(0.5), added()]
    with constant_factors([additions], torch.bfloat16):
        a, b = factors_of(additions, torch.bfloat16)
        assert torch.equal(a, torch.cat([additions[0].a, additions[3].a])) and a.dtype == torch.float32
        assert [one is two.b for one, two in zip(b, additions, strict=True)] == [True] * 4
        assert not lora_factors._made


@pytest.mark.usefixtures("on_gpu")
def test_they_are_cast_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All together in one call; dropout's A is not joined, and without the context nothing is kept."""
    copies, copy = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda into, of: copies.append(len(into)) or copy(into, of))
    groups = [[added(), NOTHING, added(0.5)], [added()], [NOTHING]]
    with constant_factors(iter(groups), torch.bfloat16):
        found = [factors_of(group, torch.bfloat16) for group in groups]
        again = [factors_of([one._replace(seed=7) for one in group], torch.bfloat16) for group in groups]
        assert copies == [5] and all(one is two for one, two in zip(found[:2], again[:2], strict=True))
        assert torch.equal(found[0].a, groups[0][0].a.bfloat16()) and found[0].b[1] is None
        assert torch.equal(found[0].b[2], groups[0][2].b.bfloat16())
        assert found[2].a is None and found[2].b == [None]
    assert factors_of(groups[1], torch.bfloat16) is not found[1] and copies == [5, 2]


@pytest.mark.usefixtures("on_gpu")
def test_what_changed_after_the_context_is_read_anew() -> None:
    group = [added()]
    with constant_factors([group], torch.bfloat16):
        before = factors_of(group, torch.bfloat16).b[0].clone()
    group[0].b.data.mul_(2)
    with constant_factors([group], torch.bfloat16):
        assert torch.equal(factors_of(group, torch.bfloat16).b[0], before * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_gradients_are_the_same(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """To the last digit: products read the cast values in either case."""
    weights, x = [torch.randn(6, 8, dtype=dtype) for _ in range(3)], torch.randn(5, 8, dtype=dtype)
    additions, found = [added(), NOTHING, added()], []
    for on_gpu in (False, True):
        monkeypatch.setattr(lora_factors, "_on_gpu", lambda _, on_gpu=on_gpu: on_gpu)
        leaves = [x.clone().requires_grad_(), *(t.clone().requires_grad_() for i in (0, 2) for t in additions[i][1:3])]
        given = [Addition(None, *leaves[1:3], 0.5), NOTHING, Addition(None, *leaves[3:], 0.5)]
        with constant_factors([given], dtype):
            ys = project(leaves[0], weights, given)
            sum(y.double().square().sum() for y in ys).backward()
        found.append([*ys, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


def test_bytes_are_planned_for_a_gpu() -> None:
    assert factor_bytes(10, torch.bfloat16, torch.device("cuda")) == 20
    assert factor_bytes(10, torch.bfloat16, torch.device("cpu")) == 0
