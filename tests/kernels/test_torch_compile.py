"""Compiled elementwise functions against the plain ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from accessory.kernels.plain import gate
from accessory.kernels.plain.rms_norm import _input_gradient, _inverse_rms
from accessory.kernels.torch_compile import compile_fusible, fusible


@pytest.fixture
def compiling() -> Iterator[None]:
    """Compiled while the test runs."""
    compile_fusible(True)
    yield
    compile_fusible(False)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random bf16."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.slow
def test_plain_unless_wanted(compiling: None) -> None:
    """The function itself runs, then its compiled form, in which Python's side effects are gone."""
    calls = []

    @fusible
    def double(x: torch.Tensor) -> torch.Tensor:
        calls.append(torch.compiler.is_compiling())
        return 2 * x

    assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0))
    compile_fusible(False)
    double(torch.ones(3))
    assert calls == [True, False]


@pytest.mark.slow
def test_compiled_equal_plain(compiling: None) -> None:
    """Norm and gate, forward and backward, for two lengths: within two roundings of bf16."""
    for rows in (5, 9):
        x, up, dy = (random(rows, 64, seed=i) for i in range(3))
        weight = torch.rand(64) + 0.5
        scale = _inverse_rms(x, 1e-5)
        given = [(_inverse_rms, (x, 1e-5)), (_input_gradient, (dy, x, weight, scale)),
                 (gate.forward, (x, up, "silu")), (gate.backward, (dy, x, up, "silu"))]  # fmt: skip
        for function, arguments in given:
            found, wanted = function(*arguments), function.__wrapped__(*arguments)
            for one, other in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, wanted)), strict=True):
                torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-7)
