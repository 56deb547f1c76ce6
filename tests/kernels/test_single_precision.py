"""Products by oneDNN, and when they are PyTorch's own."""

from __future__ import annotations

import pytest
import torch

from accessory.kernels import single_precision
from accessory.kernels.single_precision import by_onednn, product


def test_equals_float64_where_a_caller_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is bit for bit PyTorch's outside, and for what oneDNN is not asked: other dtypes, strides and gradients."""
    generator = torch.Generator().manual_seed(0)
    a, w = torch.randn(40, 96, generator=generator), torch.randn(70, 96, generator=generator)
    assert torch.equal(product(a, w.t()), a @ w.t())
    narrow, wide = (a.bfloat16(), w.bfloat16().t()), (a.double(), w.double().t())
    plain = {"bf16": narrow, "fp64": wide, "strides": (a, w.t().contiguous())}
    with by_onednn():
        found = product(a, w.t())
        for name, (one, other) in plain.items():
            assert torch.equal(product(one, other), one @ other), name
        assert product(a.clone().requires_grad_(), w.t()).requires_grad
        out = torch.empty(40, 70, dtype=torch.float64)
        assert product(*wide, out=out) is out
        monkeypatch.setattr(single_precision, "_there", lambda: False)
        assert torch.equal(product(a, w.t()), a @ w.t())
    torch.testing.assert_close(found.double(), a.double() @ w.double().t(), rtol=0, atol=1e-5 * 96**0.5)


def test_it_is_asked_where_there_is_one() -> None:
    """This machine's PyTorch has it."""
    assert torch.backends.mkldnn.is_available() == single_precision._there()
