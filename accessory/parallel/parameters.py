"""Named parameters that are sliced over the ranks, and operations on all of them and on their gradients."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from accessory.parallel.data import local, sum_over_data_parallel, whole
from accessory.parallel.groups import model_parallel_group, tick
from accessory.parallel.tensor import Slicing, gather_slices, reduce_over_model_parallel


class NamedParameters(dict[str, nn.Parameter]):
    """Name -> this rank's slice of a parameter; `slicings` says how each is cut, and may name others too."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], slicings: Mapping[str, Slicing]) -> None:
        super().__init__(parameters)
        self.slicings = slicings

    @property
    def device(self) -> torch.device:
        """The device of all of them."""
        return next(iter(self.values())).device

    def only(self, names: Collection[str]) -> NamedParameters:
        """Those with such names, in the same order."""
        return NamedParameters({name: p for name, p in self.items() if name in names}, self.slicings)

    def gathered(self, values: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor on the CPU) of one parameter after the other, gathered from all ranks' slices.

        values: gathered instead, cut as the parameters of the same names. A collective: all ranks must iterate.
        """
        values = self if values is None else values
        for name in sorted(values):
            tick()
            slicing = self.slicings[name]
            tensor = gather_slices(whole(values[name].detach()), slicing.dim)
            if slicing.whole is not None:  # the last slices were padded
                tensor = tensor.narrow(slicing.dim, 0, slicing.whole)
            yield name, tensor.cpu()

    def sum_partial_gradients(self) -> None:
        """Sum the gradients that are partial on each model-parallel rank, in one message."""
        group = model_parallel_group()
        shares = [local(p.grad) for name, p in self.items() if self.slicings[name].partial and p.grad is not None]
        if dist.get_world_size(group) == 1 or not shares:
            return
        flat = torch.cat([share.flatten() for share in shares])
        dist.all_reduce(flat, group=group)
        for share, total in zip(shares, flat.split([share.numel() for share in shares]), strict=True):
            share.copy_(total.view_as(share))

    def gradient_norm(self) -> Tensor:
        """L2 norm of the whole gradient, fp32 [], equal on every rank; each value counts once however it is cut."""
        sliced, copied = [], []
        for name, parameter in self.items():
            if parameter.grad is not None:
                (copied if self.slicings[name].dim is None else sliced).append(local(parameter.grad))
        squares = torch.stack([_sum_of_squares(sliced, self.device), _sum_of_squares(copied, self.device)])
        reduce_over_model_parallel(squares[:1])
        return sum_over_data_parallel(squares.sum()).sqrt()

    def scale_gradients(self, factor: float) -> None:
        """Multiply every gradient by `factor`, in place."""
        gradients = [local(p.grad) for p in self.values() if p.grad is not None]
        if factor != 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)


def _sum_of_squares(gradients: list[Tensor], device: torch.device) -> Tensor:
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if not gradients:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(gradients)).square().sum()
