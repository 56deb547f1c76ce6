"""Which linears of a mix get four bits: those whose error at two bits harms the model most for the bits they cost.

The choice is written in the schema of GreenBit's quant_strategy.json.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from accessory.checkpoint.strategy import GREENBIT_NAMES, MEASUREMENT
from accessory.errors import ConfigError
from accessory.errors import nearest as nearest_name
from accessory.quant import MIXES, QUANT_TYPES, mixes
from accessory.quant.groups import GROUP_STORAGES

Width = tuple[int, int]
"""(bits, columns of a group)."""
NARROW, WIDE = ((kind.bits, kind.group) for kind in (mixes.NARROW, mixes.WIDE))
"""Widths of a mix's linears."""


class Gain(NamedTuple):
    """By how much the loss is expected to fall where a linear has `WIDE` instead of `NARROW`; its number of weights."""

    gain: float
    weights: int


def choose(gains: dict[str, Gain], share: float) -> dict[str, Width]:
    """Name of each linear -> its width: those of most gain for each weight are wide, at most `share` of all weights."""
    room = share * sum(gain.weights for gain in gains.values())
    chosen = dict.fromkeys(gains, NARROW)
    for name in sorted(gains, key=lambda name: (-gains[name].gain / gains[name].weights, name)):
        if gains[name].weights <= room:
            chosen[name] = WIDE
            room -= gains[name].weights
    return chosen


def strategy_document(widths: dict[str, Width]) -> dict[str, Any]:
    """The content of quant_strategy.json: full name of each linear -> its width."""
    blocks: dict[str, Any] = {}
    for name, (bits, group) in widths.items():
        _, index, linear = name.split(".", 2)
        sizes = {str(width[0]): width[1] for width in {NARROW, WIDE, (bits, group)}}
        blocks.setdefault(f"model.layers.{index}", {})[GREENBIT_NAMES[linear]] = {
            "group_size": dict(sorted(sizes.items())),
            "bits": [bits],
            "bits_prop": [1.0],
            "scale_bits": 4,
        }
    return {MEASUREMENT: blocks}


def widths_of(quant_type: str) -> Width | None:
    """The width of all linears, by the name of a storage such as int2_g64; None for a mix. Raises `ConfigError`."""
    if quant_type in MIXES:
        return None
    kind, _, group = str(quant_type).partition("_g")
    if kind in ("int2", "int3", "int4") and group in ("32", "64", "128"):
        return int(kind[3:]), int(group)
    known = (*(kind.name for kind in GROUP_STORAGES), *MIXES)
    hint = " Leave out --calibrate." if quant_type in QUANT_TYPES else nearest_name(str(quant_type), known)
    raise ConfigError(
        f"--quant_type {quant_type!r} cannot be calibrated; expected intB_gG (B 2, 3, 4; G 32, 64, 128) or "
        f"{', '.join(MIXES)}.{hint}"
    )
