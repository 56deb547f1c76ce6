"""The optimizer, its learning-rate schedule, gradient clipping over every layout, and fp16's loss scale."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from accessory.parallel.data import local, sum_over_data_parallel
from accessory.parallel.groups import model_parallel_group
from accessory.parallel.tensor import Slicing

BETAS = (0.9, 0.95)


def build_adamw(parameters: dict[str, nn.Parameter], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) over fp32 parameters; biases and norms are not decayed."""
    decayed = [p for name, p in parameters.items() if not name.endswith((".bias", "norm.weight"))]
    spared = [p for name, p in parameters.items() if name.endswith((".bias", "norm.weight"))]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=BETAS, fused=True)


def learning_rate(epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Linear from 0 to `lr` over `warmup_epochs`, then half a cosine down to `min_lr` at `epochs`. All in epochs."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = min((epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9), 1.0)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def sum_partial_gradients(parameters: dict[str, nn.Parameter], slicings: dict[str, Slicing]) -> None:
    """Complete the gradients of which every model-parallel rank holds only its share, in one message."""
    group = model_parallel_group()
    shares = [local(p.grad) for name, p in parameters.items() if slicings[name].partial and p.grad is not None]
    if dist.get_world_size(group) == 1 or not shares:
        return
    flat = torch.cat([share.flatten() for share in shares])
    dist.all_reduce(flat, group=group)
    for share, total in zip(shares, flat.split([share.numel() for share in shares]), strict=True):
        share.copy_(total.view_as(share))


def gradient_norm(parameters: dict[str, nn.Parameter], slicings: dict[str, Slicing]) -> Tensor:
    """L2 norm of the whole gradient, equal on every rank; each value counts once however it is cut or copied."""
    sliced, copied = [], []
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            (copied if slicings[name].dim is None else sliced).append(local(parameter.grad))
    device = next(iter(parameters.values())).device
    squares = torch.stack([_sum_of_squares(sliced, device), _sum_of_squares(copied, device)])
    dist.all_reduce(squares[:1], group=model_parallel_group())
    return sum_over_data_parallel(squares.sum()).sqrt()


def _sum_of_squares(gradients: list[Tensor], device: torch.device) -> Tensor:
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if not gradients:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(gradients)).square().sum()


def scale_gradients(parameters: dict[str, nn.Parameter], factor: float) -> None:
    """Multiply every gradient by `factor`, in place."""
    gradients = [local(p.grad) for p in parameters.values() if p.grad is not None]
    if factor != 1.0 and gradients:
        torch._foreach_mul_(gradients, factor)


class LossScale:
    """Keeps fp16 gradients in range (Micikevicius et al. 2018): doubled after many good steps, halved after a bad."""

    GROWTH_INTERVAL = 2000

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.value = 65536.0 if enabled else 1.0
        self.good_steps = 0

    def update(self, finite: bool) -> None:
        """Learn from whether the step's gradients were finite."""
        if not self.enabled:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps % self.GROWTH_INTERVAL == 0:
            self.value *= 2
