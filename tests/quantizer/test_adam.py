"""accessory/quantizer/adam.py against PyTorch's Adam."""

from __future__ import annotations

import torch
from torch import nn

from accessory.parallel import groups
from accessory.quantizer.adam import BETAS, ImmediateAdam


def test_is_adam_with_moments_in_bf16() -> None:
    """Forty steps with a changing rate end where PyTorch's end but for half a percent; no gradient stays."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(6, 5, generator=generator), torch.randn(3, generator=generator)]
    ours, theirs = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    groups.start("cpu")
    adam = ImmediateAdam(zip(ours, (0.02, 0.005), strict=True), groups.data_parallel_group())
    torchs = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in zip(theirs, (0.02, 0.005), strict=True)],
                              betas=BETAS, eps=1e-12)  # fmt: skip
    for step in range(40):
        target, factor = torch.randn(6, 5, generator=generator) + 2, 1 - step / 50
        for group, rate in zip(torchs.param_groups, (0.02, 0.005), strict=True):
            group["lr"] = rate * factor
        losses = [(p[0] - target).square().mean() + (p[1] ** 4).sum() for p in (ours, theirs)]
        adam.backward(losses[0], factor)
        torchs.zero_grad()
        losses[1].backward()
        torchs.step()
        assert all(p.grad is None for p in ours)
    for a, b, first in zip(ours, theirs, start, strict=True):
        assert (a - b).abs().max() < 0.01 * (b - first).abs().max()
    adam.close()
    before = ours[1].detach().clone()
    (ours[1] ** 4).sum().backward()
    assert torch.equal(ours[1], before)
