"""Storage formats of frozen weights: how a matrix lies in memory, and how to multiply with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from accessory.errors import ConfigError, nearest
from accessory.quant.four_bit import FourBitWeight
from accessory.quant.int8 import Int8Weight
from accessory.quant.packed import PackedWeight

STORAGES: dict[str, Callable[[tuple[int, int]], PackedWeight]] = {
    "nf4": partial(FourBitWeight, quant_type="nf4", nested=True),
    "nf4_single": partial(FourBitWeight, quant_type="nf4", nested=False),
    "fp4": partial(FourBitWeight, quant_type="fp4", nested=True),
    "fp4_single": partial(FourBitWeight, quant_type="fp4", nested=False),
    "int8": Int8Weight,
}
"""Name given to `--quant_type` -> a function making an empty packed matrix of a shape [N, K]."""


def storage(name: str) -> Callable[[tuple[int, int]], PackedWeight]:
    """The maker of packed matrices called `name`. Raises `ConfigError` for a name we do not know."""
    if name not in STORAGES:
        known = ", ".join(STORAGES)
        raise ConfigError(f"--quant_type {name!r} is not a storage format.{nearest(name, STORAGES)} Known: {known}.")
    return STORAGES[name]


__all__ = ["STORAGES", "PackedWeight", "storage"]
