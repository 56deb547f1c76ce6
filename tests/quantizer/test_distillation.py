"""accessory/quantizer/distillation.py against float64."""

from __future__ import annotations

import torch

from accessory.quantizer.distillation import divergence


def test_divergence() -> None:
    """Value and gradient of sum KL(teacher || model), over more tokens than a chunk; padding rows take no part."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(50, 16, generator=generator)
    hidden, teacher = torch.randn(2, 300, 16, generator=generator)
    hidden.requires_grad_(True)
    found = divergence(hidden, teacher, head, 45)
    (found / 3).backward()
    wide = hidden.detach().double().requires_grad_(True)
    log_q = (wide @ head[:45].double().t()).log_softmax(1)
    log_p = (teacher.double() @ head[:45].double().t()).log_softmax(1)
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
    (expected / 3).backward()
    assert torch.allclose(found.double(), expected, rtol=1e-5)
    assert torch.allclose(hidden.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
    assert divergence(teacher, teacher, head, 45).abs() < 1e-3
