"""Another trained part beside a base that is loaded: what both have of the base is handed on, and not read again."""

from __future__ import annotations

from collections.abc import Set

from torch import nn

from accessory.checkpoint.load import targets
from accessory.model.decoder import Decoder
from accessory.quant import PackedWeight


def hand_on(old: Decoder, new: Decoder, trained: Set[str]) -> set[str]:
    """Put what `old` was filled with from its base in its place in `new`, on meta; returns the names of what it was.

    Both have the same base. trained: names of the tensors that either has from a trained part.
    """
    handed = in_common(old, new, trained)
    held = {target.name: getattr(target.owner, target.leaf) for target in targets(old)}
    for target in list(targets(new)):
        if target.name in handed:
            setattr(target.owner, target.leaf, held[target.name])
    return handed


def in_common(old: Decoder, new: Decoder, trained: Set[str]) -> set[str]:
    """Names of what `hand_on` would put in its place; either may be on meta."""
    if old.args.rotary_layout != new.args.rotary_layout:  # the same file is then read in another order
        return set()
    trained = trained | {name.rpartition(".")[0] for name in trained}  # a packed matrix has a trained part of its own
    there = {target.name: getattr(target.owner, target.leaf) for target in targets(old)}
    return {
        target.name
        for target in targets(new)
        if target.name not in trained
        and target.name in there
        and _is_like(there[target.name], getattr(target.owner, target.leaf))
    }


def _is_like(held: nn.Parameter | PackedWeight, wanted: nn.Parameter | PackedWeight) -> bool:
    """Whether one could be the other: of one format or dtype, and shape."""
    if type(held) is not type(wanted) or held.shape != wanted.shape:
        return False
    return isinstance(held, PackedWeight) or held.dtype == wanted.dtype
