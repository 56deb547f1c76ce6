"""Storage formats of matrices: how one lies in memory and in files, and how to multiply with it. One class a format."""

from __future__ import annotations

from accessory.errors import ConfigError, nearest
from accessory.quant.four_bit import Fp4, Fp4Single, Nf4, Nf4Single
from accessory.quant.groups import GROUP_STORAGES
from accessory.quant.int8 import Int8Weight
from accessory.quant.llm_int8 import LlmInt8
from accessory.quant.nf4_scales import Nf4Scales
from accessory.quant.packed import PackedWeight

STORAGES: dict[str, type[PackedWeight]] = {
    kind.name: kind for kind in (Nf4, Nf4Single, Fp4, Fp4Single, Int8Weight, LlmInt8, *GROUP_STORAGES, Nf4Scales)
}
"""Name given to `--quant_type` -> the class that packs a matrix so."""


def storage(name: str) -> type[PackedWeight]:
    """The storage format called `name`. Raises `ConfigError` for a name we do not know."""
    if name not in STORAGES:
        known = ", ".join(STORAGES)
        raise ConfigError(f"--quant_type {name!r} is not a storage format.{nearest(name, STORAGES)} Known: {known}.")
    return STORAGES[name]


__all__ = ["STORAGES", "PackedWeight", "storage"]
