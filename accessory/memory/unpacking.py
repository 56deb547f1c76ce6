"""Which runs may unpack matrices ahead, into a second buffer. Its memory is planned, before its worth is measured."""

from __future__ import annotations

import torch

from accessory.model.block import Block
from accessory.model.decoder import Decoder
from accessory.parallel.data import is_sharded
from accessory.quant import PackedWeight


def may_unpack_ahead(decoder: Decoder, device: torch.device) -> bool:
    """Whether on a GPU matrices are packed, lie whole on this rank, and are changed by no step."""
    packed = [module for module in decoder.modules() if isinstance(module, PackedWeight)]
    in_blocks = packed_by_input(next(block for _, block in decoder.blocks()))
    stays = not any(m.trained or m.moved for m in packed)
    return device.type == "cuda" and bool(in_blocks) and stays and not any(map(is_sharded, decoder.parameters()))


def packed_by_input(block: Block) -> list[list[PackedWeight]]:
    """The packed matrices of a block, those that share an input together."""
    linears = (*block.attention.linears_by_input(), *block.feed_forward.linears_by_input())
    found = [[linear.weight for linear in group if isinstance(linear.weight, PackedWeight)] for group in linears]
    return [group for group in found if group]
