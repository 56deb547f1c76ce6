"""Adam that takes each gradient as soon as a backward has made it, so that the gradients of one matrix exist at a time.

Its moments are in bf16: with these betas every step changes them by more than bf16 leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from accessory.quantizer.grid import pieces

BETAS = (0.9, 0.95)
_EPSILON = 1e-12  # gradients of a relative error by millions of weights are small


class ImmediateAdam:
    """Trains parameters with a learning rate each: inside `step` a backward updates them, gradient by gradient.

    Gradients are summed over `group` first; every rank must have the same graph. A parameter is used once in a forward.
    """

    def __init__(self, rates: Iterable[tuple[nn.Parameter, float]], group: dist.ProcessGroup) -> None:
        self.rates = dict(rates)
        self.moments = {p: torch.zeros((2, *p.shape), dtype=torch.bfloat16, device=p.device) for p in self.rates}
        self.group, self.steps, self.factor = group, 0, 0.0
        self.hooks = [p.register_post_accumulate_grad_hook(self._update) for p in self.rates]

    def backward(self, loss: Tensor, factor: float) -> None:
        """One step: the backward of `loss`, with all learning rates times `factor`."""
        self.steps, self.factor = self.steps + 1, factor
        loss.backward()

    def close(self) -> None:
        """Stop watching the parameters."""
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def _update(self, parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        if dist.get_world_size(self.group) > 1:
            dist.all_reduce(gradient, group=self.group)
        of_first, of_second = (1 - beta**self.steps for beta in BETAS)
        rate = self.rates[parameter] * self.factor / of_first
        for part in pieces(len(parameter), gradient[0].numel()):
            moments, g = self.moments[parameter][:, part], gradient[part]
            first, second = (moment.float() for moment in moments)
            first.lerp_(g, 1 - BETAS[0])
            second.lerp_(g.square_(), 1 - BETAS[1])
            moments[0], moments[1] = first, second
            parameter[part].addcdiv_(first, second.div_(of_second).sqrt_().add_(_EPSILON), value=-rate)
