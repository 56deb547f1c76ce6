"""quant_strategy.json: how many bits each linear of a mix has. The schema and the names in it are GreenBit's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accessory.checkpoint.naming import BLOCK_LINEAR
from accessory.checkpoint.source import STRATEGY_FILE, Source, read_json
from accessory.errors import CheckpointError, ConfigError, nearest
from accessory.quant import PackedWeight
from accessory.quant.groups import BITS, group_storage

MEASUREMENT = "measurement"
"""The key in that file under which its blocks stand."""
GREENBIT_NAMES = {
    "attention.wq": "q_proj",
    "attention.wk": "k_proj",
    "attention.wv": "v_proj",
    "attention.wo": "o_proj",
    "feed_forward.w1": "gate_proj",
    "feed_forward.w2": "down_proj",
    "feed_forward.w3": "up_proj",
}
"""A linear's name in a block -> its name in that file."""
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
          "up_proj": "gate_up_proj"}  # fmt: skip
"""A linear -> the one that it is part of in models with fewer matrices."""


def strategy_of(path: Path) -> dict[str, Any] | None:
    """Block -> linear -> what the quant_strategy.json in the directory `path` says of it; None: there is none.

    Raises `CheckpointError` for a file that is no such object.
    """
    file = path / STRATEGY_FILE
    if not file.is_file():
        return None
    blocks = read_json(file).get(MEASUREMENT)
    if not (isinstance(blocks, dict) and all(isinstance(block, dict) for block in blocks.values())):
        raise CheckpointError(f"{file}: {MEASUREMENT!r} is {str(blocks)[:80]}; expected an object of blocks.")
    return blocks


def storages_of_mix(sources: list[Source], mix: str) -> dict[str, type[PackedWeight]]:
    """Linear -> its storage in a plain base that is packed as a mix, as its quant_strategy.json says.

    Raises `ConfigError` where there is no such file, `CheckpointError` for one that does not say it of every linear.
    """
    base = sources[0]
    blocks = strategy_of(base.path)
    if blocks is None:
        raise ConfigError(
            f"--quant_type {mix}: {base.path} has no {STRATEGY_FILE}, which says which linears have 4 bits. Measure it "
            f"and pack the base with: python tools/quantize.py {base.path} TARGET --quant_type {mix} --calibrate DATA"
        )
    linears = [name.removesuffix(".weight") for name in base.tensors if BLOCK_LINEAR.fullmatch(name)]
    return {name: _storage(blocks, name, base.path / STRATEGY_FILE) for name in linears}


def _storage(blocks: dict[str, Any], linear: str, file: Path) -> type[PackedWeight]:
    _, index, inner = linear.split(".", 2)
    block, name = f"model.layers.{index}", GREENBIT_NAMES[inner]
    if block not in blocks:
        raise CheckpointError(f"{file}: has no {block!r}, where {name} of it is told of.{nearest(block, blocks)}")
    stated = blocks[block].get(name, blocks[block].get(_FUSED.get(name)))
    if stated is None:
        raise CheckpointError(f"{file}: {block} has no {name!r}.{nearest(name, blocks[block])}")
    try:
        bits = stated["bits"][0]
        group = stated["group_size"][str(bits)]
    except (KeyError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{file}: {block}.{name} is {str(stated)[:80]}; expected bits and their group_size."
        ) from error
    if bits not in BITS or not isinstance(group, int) or group < 1:
        raise CheckpointError(
            f"{file}: {block}.{name} has {bits!r} bits in groups of {group!r}; expected {', '.join(map(str, BITS))} "
            "bits in groups of some columns."
        )
    return group_storage(bits, group)
