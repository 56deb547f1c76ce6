"""The optimizer that `--optim` names, over every layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from accessory.kernels.bitsandbytes_library import functional as kernels
from accessory.parallel.data import local
from accessory.quant.moments import BLOCK as MOMENT_BLOCK
from accessory.quant.moments import levels, pack_moment, unpack_moment

BETAS = (0.9, 0.95)
"""AdamW's decay of the two moments; `--adam_beta2` sets the second."""
EPS = 1e-8
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw")
"""Values of `--optim`."""
LR_SCHEDULES = ("cosine", "constant")
"""Values of `--lr_schedule`."""
MIN_8BIT = 4096  # values from which on bitsandbytes' own optimizers use 8 bits
MIN_PAGED = 100_000  # values from which on they page
_MOMENTS = ("exp_avg", "exp_avg_sq")
_OF_PACKED = (".weight.scales", ".weight.zeros", ".weight.displacement")
_EMBEDDINGS = ("tok_embeddings.", "pos_embeddings.")


def build_optimizer(
    kind: str,
    parameters: dict[str, nn.Parameter],
    lr: float,
    weight_decay: float,
    beta2: float = BETAS[1],
    rates: Mapping[str, float] = MappingProxyType({}),
) -> torch.optim.Optimizer:
    """The optimizer that `--optim KIND` names: AdamW (Loshchilov & Hutter 2019) over fp32 parameters.

    Biases, norms, scales and what belongs to packed weights are not decayed. rates: name -> what the learning rate is
    multiplied by, 1 where none is stated; a group of the optimizer has it as `rate`. On the CPU `paged_adamw` is
    `adamw`: there is no smaller memory to page out of.
    """
    spared = {name for name in parameters if name.endswith((".bias", ".scale", "norm.weight", *_OF_PACKED))}
    alike: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        alike.setdefault((0.0 if name in spared else weight_decay, rates.get(name, 1.0)), []).append(parameter)
    groups = [
        {"params": members, "weight_decay": decay, "rate": rate, "betas": (BETAS[0], beta2)}
        for (decay, rate), members in alike.items()
    ]
    if kind == "adamw8bit":
        return KernelAdamW(groups, lr, eight_bit={p for name, p in parameters.items() if _suits_8_bits(name, p)})
    if kind == "paged_adamw" and next(iter(parameters.values())).device.type == "cuda":
        return KernelAdamW(groups, lr, paged=True)
    return torch.optim.AdamW(groups, lr=lr, eps=EPS, fused=True)


def state_bytes(kind: str, parameters: dict[str, nn.Parameter]) -> int:
    """Bytes that the two moments of whole `parameters` take, as `build_optimizer(KIND)` keeps them.

    Moments in managed memory count too: a GPU pages them out only when it is full.
    """
    total = 0
    for name, parameter in parameters.items():
        count = parameter.numel()
        narrow = kind == "adamw8bit" and _suits_8_bits(name, parameter)
        total += 2 * (count + 4 * -(-count // MOMENT_BLOCK)) if narrow else 8 * count
    return total


def _suits_8_bits(name: str, parameter: nn.Parameter) -> bool:
    # By the size of the whole parameter, so that all its shards are kept alike. Rows of an embedding are stepped on
    # rarely and unevenly, which 8 bits serve badly (Dettmers et al. 2022, 2.3).
    return parameter.numel() >= MIN_8BIT and not name.startswith(_EMBEDDINGS)


def moment_device(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> torch.device:
    """The device of a restored moment of `parameter` until the next step: the host, if the optimizer pages it.

    A sharded moment must be on the parameter's device.
    """
    paged = isinstance(optimizer, KernelAdamW) and optimizer.paged and local(parameter) is parameter
    return torch.device("cpu") if paged else parameter.device


def can_be_guarded(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `guarded_step` can step `optimizer`: it must be PyTorch's fused AdamW, over unsharded parameters."""
    whole = all(local(p) is p for group in optimizer.param_groups for p in group["params"])
    return isinstance(optimizer, torch.optim.AdamW) and whole


def guarded_step(optimizer: torch.optim.Optimizer, divisor: Tensor, skip: Tensor) -> None:
    """Step with every gradient divided by `divisor`, fp32 []; nothing changes where `skip`, bool [], holds.

    Both stay on the device, so the host need not wait for them, as in PyTorch's own gradient scaler.
    """
    optimizer.grad_scale, optimizer.found_inf = divisor, skip.to(torch.float32)
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf


def moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    """Running means of gradients of this rank's shard of a `parameter`, and of their squares: unbiased, fp32."""
    state, found = optimizer.state[parameter], []
    betas = next(group["betas"] for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    for name, beta in zip(_MOMENTS, betas, strict=True):
        moment = local(state[name])
        if moment.dtype == torch.uint8:
            moment = unpack_moment(moment, state[f"{name}_scales"], signed=name == "exp_avg")
        found.append(moment / (1 - beta ** int(state["step"])))
    return tuple(found)


def map_first_moment(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, change: Callable[[Tensor], Tensor]
) -> None:
    """Replace it by what `change` makes of it, in the form it is kept in; nothing before the first step."""
    state = optimizer.state.get(parameter)
    if not state:
        return
    moment = local(state["exp_avg"])
    if moment.dtype == torch.uint8:
        values = change(unpack_moment(moment, state["exp_avg_scales"], signed=True))
        state["exp_avg"], state["exp_avg_scales"] = pack_moment(values, signed=True)
    else:
        moment.copy_(change(moment))


class KernelAdamW(torch.optim.Optimizer):
    """AdamW by bitsandbytes' kernels, with moments in 8 bits or in managed memory that a full GPU pages out.

    bitsandbytes' own optimizers do not support sharded parameters; here the kernels get each rank's shard.
    State of a parameter: `step`, fp32, on the CPU; `exp_avg` and `exp_avg_sq`, of the shard's shape: fp32, or uint8
    codes beside `exp_avg_scales` and `exp_avg_sq_scales` (see `accessory.quant.moments`). A restored state may be
    sharded as the parameter is, and of either precision; it is brought into that form by the next step.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        *,
        eight_bit: set[nn.Parameter] = frozenset(),
        paged: bool = False,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": BETAS, "eps": EPS, "weight_decay": 0.0})
        self.eight_bit, self.paged = eight_bit, paged

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step on every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self._prepared(parameter)
                    state["step"] += 1
                    if local(parameter).numel():
                        self._update(parameter, state, group)
        if self.paged:
            torch.cuda.synchronize()  # the host may read the moments from now on

    def _prepared(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The parameter's state in the form that the kernels take."""
        state = self.state[parameter]
        shard = local(parameter)
        state["step"] = state.get("step", torch.tensor(0.0)).cpu()
        for moment in _MOMENTS:
            values = local(state[moment]) if moment in state else torch.zeros_like(shard, dtype=torch.float32)
            if parameter in self.eight_bit and values.dtype != torch.uint8:
                values, state[f"{moment}_scales"] = pack_moment(values, signed=moment == "exp_avg")
            if self.paged and shard.numel() >= MIN_PAGED and not getattr(values, "is_paged", False):
                paged = kernels.get_paged(*shard.shape, dtype=torch.float32, device=shard.device)
                values = paged.copy_(values)  # PyTorch takes it for host memory
            state[moment] = values if getattr(values, "is_paged", False) else values.to(shard.device)
        return state

    def _update(self, parameter: nn.Parameter, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        shard, gradient = local(parameter), local(parameter.grad).contiguous()
        first, second = (state[moment] for moment in _MOMENTS)
        (beta1, beta2), eps, step = group["betas"], group["eps"], int(state["step"].item())
        for moment in (first, second):
            if getattr(moment, "is_paged", False):
                kernels.prefetch_tensor(moment)
        if first.dtype != torch.uint8:
            kernels.optimizer_update_32bit(
                "adam", gradient, shard, first, beta1, eps, step, group["lr"], second, beta2,
                weight_decay=group["weight_decay"],
            )  # fmt: skip
            return
        kernels.optimizer_update_8bit_blockwise(
            "adam", gradient, shard, first, second, beta1, beta2, 0.0, 0.0, eps, step, group["lr"],
            levels(True, shard.device), levels(False, shard.device), state["exp_avg_scales"],
            state["exp_avg_sq_scales"], weight_decay=group["weight_decay"],
        )  # fmt: skip
