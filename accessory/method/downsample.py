"""Downsamples of side tuning: a base state [T, D] -> what the side network reads of it [T, D / r].

(QST, Zhang et al. 2024, section 3.2 and table 6.)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from accessory.kernels.addition import Addition
from accessory.method.side_settings import SideSettings
from accessory.model.decoder import Projection
from accessory.model.feed_forward import activate
from accessory.model.norm import LayerNorm
from accessory.model.recomputable import Recomputable

NORM_EPS = 1e-5
BLOCK = 64
"""Channels that share a scale where a state is kept in 8 bits; a few are a thousand times the others."""


class Downsample(nn.Module, ABC):
    """state [T, D], without a gradient -> [T, narrow], in its dtype."""

    def __init__(self, wide: int, narrow: int, settings: SideSettings) -> None:
        super().__init__()
        self.wide, self.narrow = wide, narrow

    @abstractmethod
    def forward(self, state: Tensor) -> Tensor:
        """One base state."""


class Linear(Downsample):
    """One matrix."""

    def __init__(self, wide: int, narrow: int, settings: SideSettings) -> None:
        super().__init__(wide, narrow, settings)
        self.weight = Projection(wide, narrow, torch.float32)
        self.bits = settings.state_bits

    def forward(self, state: Tensor) -> Tensor:
        """W state."""
        return self.weight(kept_in(self.bits, state))


class LowRank(Downsample):
    """b a state, by way of `peft_hidden_size` channels."""

    def __init__(self, wide: int, narrow: int, settings: SideSettings) -> None:
        super().__init__(wide, narrow, settings)
        self.a = Projection(wide, settings.peft_hidden_size, torch.float32)
        self.b = Projection(settings.peft_hidden_size, narrow, torch.float32)
        self.bits = settings.state_bits

    def forward(self, state: Tensor) -> Tensor:
        """B A state."""
        return self.b(self.a(kept_in(self.bits, state)))


class Adapter(LowRank):
    """norm(B act(A norm(dropout(state)))), each norm only if the settings ask for it."""

    def __init__(self, wide: int, narrow: int, settings: SideSettings) -> None:
        super().__init__(wide, narrow, settings)
        self.norm_before = LayerNorm(wide, NORM_EPS) if settings.add_layer_norm_before_adapter else None
        self.norm_after = LayerNorm(narrow, NORM_EPS) if settings.add_layer_norm_after_adapter else None
        self.activation, self.dropout = settings.adapter_activation, settings.dropout

    def forward(self, state: Tensor) -> Tensor:
        """The adapter."""
        x = kept_in(self.bits, state)
        if self.dropout and self.training:
            x = _dropped(x, self.dropout)
        if self.norm_before is not None:
            x = self.norm_before.recomputable(x.value)
        low = self.b(activate(self.a(x), self.activation))
        return low if self.norm_after is None else self.norm_after(low)


class AveragePool(Downsample):
    """The mean of each r neighbouring channels. It has no parameters, so nothing of the state is kept."""

    def forward(self, state: Tensor) -> Tensor:
        """state's means."""
        return _groups(state, self.narrow).mean(-1)


class MaximumPool(Downsample):
    """The largest of each r neighbouring channels."""

    def forward(self, state: Tensor) -> Tensor:
        """state's maxima."""
        return _groups(state, self.narrow).amax(-1)


DOWNSAMPLES: dict[str, type[Downsample]] = {
    "adapter": Adapter, "lora": LowRank, "linear": Linear, "avgpool": AveragePool, "maxpool": MaximumPool,
}  # fmt: skip


def make_downsample(wide: int, narrow: int, settings: SideSettings) -> Downsample:
    """The kind that the settings ask for."""
    return DOWNSAMPLES[settings.downsample](wide, narrow, settings)


def _groups(state: Tensor, narrow: int) -> Tensor:
    """[T, D] -> [T, narrow, r]; channels beyond narrow x r are left out."""
    each = state.shape[1] // narrow
    return state[:, : narrow * each].unflatten(1, (narrow, each))


def kept_in(bits: int, state: Tensor) -> Recomputable:
    """The state [T, D], and what is kept of it for the gradient of its first matrix: itself, or 8-bit codes and scales.

    A code is the nearest of 255 multiples of its block's largest value / 127, so that no value is off by more than a
    254th of that. The forward reads the state itself.
    """
    if bits == 16 or not torch.is_grad_enabled():
        return Recomputable.of(state)
    blocks = state.unflatten(1, (-1, math.gcd(state.shape[1], BLOCK)))
    scales = blocks.abs().amax(-1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny * 127) / 127
    codes = (blocks / scales).round_().to(torch.int8)
    dtype = state.dtype  # `make` is kept for the backward, so it must not hold the state itself
    return Recomputable(state, (codes, scales), lambda codes, scales: (codes * scales).flatten(1).to(dtype))


def _dropped(state: Recomputable, share: float) -> Recomputable:
    """The state with a share of its values at zero and the others larger; beside the state only a seed is kept.

    The seed comes from the CPU's generator, which is in the same state on all ranks of a model-parallel group.
    """
    chosen = Addition(dropout=share, seed=int(torch.randint(1 << 62, ())))

    def drop(value: Tensor) -> Tensor:
        """value [T, D] with its share of numbers dropped and the others scaled up, of the same shape and dtype."""
        return value * chosen.dropout_mask(value).mul_(1 / (1 - share))

    make = state.make
    return Recomputable(drop(state.value), state.inputs, lambda *kept: drop(make(*kept)))
