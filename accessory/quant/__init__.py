"""Storage formats of matrices: how one lies in memory and in files, and how to multiply with it. One class a format."""

from __future__ import annotations

from accessory.errors import ConfigError, nearest
from accessory.quant.four_bit import Fp4, Fp4Single, Nf4, Nf4Single
from accessory.quant.groups import GROUP_STORAGES, group_storage_named
from accessory.quant.int8 import Int8Weight
from accessory.quant.llm_int8 import LlmInt8
from accessory.quant.mixes import MIXES, NARROW
from accessory.quant.nf4_scales import Nf4Scales
from accessory.quant.packed import PackedWeight

STORAGES: dict[str, type[PackedWeight]] = {
    kind.name: kind for kind in (Nf4, Nf4Single, Fp4, Fp4Single, Int8Weight, LlmInt8, *GROUP_STORAGES, Nf4Scales)
}
"""Name given to `--quant_type` -> the class that packs a matrix so."""


QUANT_TYPES = (*STORAGES, *MIXES)
"""What `--quant_type` takes."""


def find_storage(name: object) -> type[PackedWeight] | None:
    """The storage of that name, also in groups of another size (`int4_g1024`), as files may have it; None: none is."""
    return (STORAGES.get(name) or group_storage_named(name)) if isinstance(name, str) else None


def storage(name: str) -> type[PackedWeight]:
    """The storage format called `name`; of a mix, that of most linears. Raises `ConfigError` for an unknown name."""
    found = NARROW if name in MIXES else find_storage(name)
    if found is None:
        known = ", ".join(QUANT_TYPES)
        raise ConfigError(f"--quant_type {name!r} is not a storage format.{nearest(name, QUANT_TYPES)} Known: {known}.")
    return found


__all__ = ["MIXES", "QUANT_TYPES", "STORAGES", "PackedWeight", "find_storage", "storage"]
