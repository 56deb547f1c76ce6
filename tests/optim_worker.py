"""Run under torchrun with two ranks: the norm of one gradient, cut over tensor-parallel or data-parallel ranks.

And 8-bit AdamW on sharded parameters, against bitsandbytes' own on the whole ones.
"""

import sys
from pathlib import Path

import bitsandbytes
import torch
from fairscale.nn.model_parallel import destroy_model_parallel
from torch import nn

from accessory.optim import BETAS, build_optimizer
from accessory.parallel import groups
from accessory.parallel.data import DataParallel, local, whole
from accessory.parallel.parameters import NamedParameters
from accessory.parallel.tensor import Slicing

SLICINGS = {"rows": Slicing(dim=0), "columns": Slicing(dim=1), "shares": Slicing(partial=True), "copies": Slicing()}


def gradients() -> dict[str, torch.Tensor]:
    """The whole gradient, the same on both ranks."""
    torch.manual_seed(0)
    return {name: torch.randn(5 if slicing.dim is None else 4, 6) for name, slicing in SLICINGS.items()}


class Linear(nn.Module):
    """A function of four parameters whose gradient is `gradients()` times its input."""

    def __init__(self) -> None:
        super().__init__()
        for name, gradient in gradients().items():
            setattr(self, name, nn.Parameter(torch.zeros(gradient.shape)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all parameters."""
        return x * sum((getattr(self, name) * gradient).sum() for name, gradient in gradients().items())


def tensor_parallel(rank: int) -> torch.Tensor:
    """Slices of the first two, shares that sum up to the third, copies of the fourth."""
    share = torch.full((5, 6), 3.0 if rank else -3.0)
    parameters = {}
    for name, gradient in gradients().items():
        dim = SLICINGS[name].dim
        gradient = gradient if dim is None else gradient.chunk(2, dim)[rank]
        parameters[name] = nn.Parameter(torch.zeros(gradient.shape))
        parameters[name].grad = (gradient / 2 + share if SLICINGS[name].partial else gradient).clone()
    parameters = NamedParameters(parameters, SLICINGS)
    parameters.sum_partial_gradients()
    torch.testing.assert_close(parameters["shares"].grad, gradients()["shares"])
    return parameters.gradient_norm()


def data_parallel(layout: groups.Layout) -> torch.Tensor:
    """Shards of all, of which the ranks' rows are unequal, after a backward that sums over both ranks."""
    module = Linear()
    DataParallel(layout, "sdp", base_is_trained=False).shard_root(module)
    module(torch.tensor(0.5)).backward()  # half of the gradient on each rank
    parameters = dict(module.named_parameters())
    assert sorted({local(p.grad).shape[0] for p in parameters.values()})[0] < 4
    for name, gradient in gradients().items():
        torch.testing.assert_close(whole(parameters[name].grad), gradient)
    return NamedParameters(parameters, SLICINGS).gradient_norm()


def eight_bit_shards(layout: groups.Layout) -> None:
    """Rows are blocks, so that shards are quantized as the whole is; of one parameter the second rank has nothing."""
    torch.manual_seed(0)
    shapes = {"many": (30, 256), "one": (1, 5120), "few": (3, 8)}
    module, copies = nn.Module(), {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    for name, copy in copies.items():
        setattr(module, name, nn.Parameter(copy.detach().clone()))
    module.forward = lambda: sum((p * copies[name].grad).sum() / 2 for name, p in module.named_parameters())
    DataParallel(layout, "sdp", base_is_trained=False).shard_root(module)
    parameters = dict(module.named_parameters())
    optimizer = build_optimizer("adamw8bit", parameters, 0.01, 0.1)
    reference = bitsandbytes.optim.AdamW8bit(copies.values(), lr=0.01, betas=BETAS, weight_decay=0.1)
    for _ in range(3):
        for copy in copies.values():
            copy.grad = torch.randn_like(copy)
        module().backward()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    for name, copy in copies.items():
        assert torch.equal(whole(parameters[name]).detach(), copy), name
        assert optimizer.state[parameters[name]]["exp_avg"].shape == local(parameters[name]).shape
    if layout.rank == 1:
        assert not local(parameters["one"]).numel()


layout = groups.start("cpu", model_parallel_size=2)
found = [tensor_parallel(layout.rank).item()]
destroy_model_parallel()
layout = groups.start("cpu")
found.append(data_parallel(layout).item())
eight_bit_shards(layout)
expected = torch.cat([gradient.flatten() for gradient in gradients().values()]).norm().item()
Path(sys.argv[1], f"norms.{layout.rank}").write_text(f"{expected} {found[0]} {found[1]}")
groups.end_process()
