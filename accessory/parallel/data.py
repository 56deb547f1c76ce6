"""Data parallelism: what each rank keeps of the trained and the frozen part (PyTorch FSDP2).

`sdp`: the frozen base is whole on every rank; trained parameters' gradients and optimizer state are sharded (ZeRO-2).
`fsdp`: the frozen base, packed codes and all, is sharded too, and gathered block by block (ZeRO-3).
"""

from __future__ import annotations

import sys
from collections.abc import Set

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from accessory.errors import ConfigError
from accessory.parallel.groups import Layout, data_parallel_group


class DataParallel:
    """Shards a model block by block as it is filled. With one data-parallel rank it does nothing."""

    def __init__(self, layout: Layout, mode: str, base_is_trained: bool) -> None:
        self.mode, self.active = mode, layout.dp_size > 1
        # A small trained part is gathered and reduced in one message, a trained base block by block.
        self.per_block = mode == "fsdp" or base_is_trained
        if self.active:
            self.mesh = DeviceMesh.from_group(data_parallel_group(), layout.device.type, mesh_dim_names=("dp",))

    def shard_block(self, block: nn.Module) -> None:
        """Shard one decoder block, once its weights are in place."""
        if self.active and self.per_block:
            self._shard(block)

    def shard_root(self, model: nn.Module, also: tuple[str, ...] = (), whole: Set[nn.Parameter] = frozenset()) -> None:
        """Shard what lies outside the blocks, and set how gradients are reduced: summed, never averaged.

        also: methods beside `forward` that may be called on the sharded model, by all ranks. whole: frozen parameters
        that are not sharded.
        """
        if not self.active:
            return
        from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

        self._shard(model, whole)
        for name in also:
            register_fsdp_forward_method(model, name)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def _shard(self, module: nn.Module, whole: Set[nn.Parameter] = frozenset()) -> None:
        from torch.distributed.fsdp import fully_shard  # takes half a second, for which a single process has no use

        frozen = {p for p in module.parameters() if not p.requires_grad} if self.mode == "sdp" else set(whole) or None
        try:
            fully_shard(
                module, mesh=self.mesh, reshard_after_forward=self.mode == "fsdp", ignored_params=frozen or None
            )
        except RuntimeError as error:
            if "floating point dtype can require gradients" not in str(error):
                raise
            raise ConfigError(
                f"--data_parallel fsdp: torch {torch.__version__} cannot shard integers, which packed weights are. "
                "Give --data_parallel sdp, leave out --quant, or install torch 2.13."
            ) from error


def reduce_gradients(model: nn.Module, last: bool) -> None:
    """Tell the next backward of a sharded model whether to reduce gradients: only a step's last micro-batch does."""
    sharding = sys.modules.get("torch.distributed.fsdp")
    if sharding is not None and isinstance(model, sharding.FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)


def reshard(model: nn.Module) -> None:
    """Leave of a sharded model only this rank's shards, where a forward without a backward has gathered all of it.

    What was gathered would be used again, and have nothing of what changes until then.
    """
    sharding = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if sharding is not None else ():
        if isinstance(module, sharding.FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only a shard of it. Does not import FSDP (half a second) if nothing else has."""
    sharding = sys.modules.get("torch.distributed.tensor")
    return sharding is not None and isinstance(tensor, sharding.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor gathered from its data-parallel shards (a collective), or itself where it is not sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(values: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `values`, cut as the sharded tensor `like` is; the inverse of `whole`. No communication."""
    if not is_sharded(like):
        return values
    mesh, shard = like.device_mesh, like.to_local()
    chunks = values.chunk(mesh.size(), dim=0)
    rank = mesh.get_local_rank()
    mine = chunks[rank] if rank < len(chunks) else values[:0]
    return as_shard(mine.to(shard.dtype).clone(), like)


def as_shard(part: Tensor, like: Tensor) -> Tensor:
    """Wrap this rank's shard as a tensor that is sharded as `like` is. No communication."""
    return type(like).from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def summed_on_host(values: np.ndarray) -> np.ndarray:
    """int64 values added up over the data-parallel ranks. A collective on the host, which waits for no GPU."""
    return sum_over_data_parallel(torch.from_numpy(values.copy())).numpy()


def sum_over_data_parallel(tensor: Tensor) -> Tensor:
    """Sum a small tensor over the data-parallel ranks, in place."""
    group = data_parallel_group()
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor
