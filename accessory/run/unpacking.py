"""Decides whether to unpack matrices ahead, by measuring both ways before a run's first step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch

from accessory.memory.unpacking import may_unpack_ahead, packed_by_input
from accessory.model.decoder import Decoder
from accessory.quant import PackedWeight, workspace
from accessory.quant.ahead import Ahead, CudaLanes, unpacking_ahead
from accessory.quant.products import sum_of_products

_WORTH = 0.97  # unpacking ahead must take less than this share of the time without it; the rest is noise
_ROUNDS = 5


def chosen_ahead(decoder: Decoder, tokens: int) -> tuple[Ahead | None, list[str]]:
    """(what unpacks ahead in steps of `tokens` tokens, or None, and lines that say so).

    Only matrices that lie whole on a GPU, and that no step changes, are unpacked ahead.
    """
    device = decoder.frequencies.device
    if not may_unpack_ahead(decoder, device):
        return None, []
    inputs, ahead = packed_by_input(next(block for _, block in decoder.blocks())), Ahead(CudaLanes(device))
    largest = max(w.shape.numel() for w in chain(*inputs)) * decoder.dtype.itemsize
    try:
        without = _time(lambda: _products(inputs, tokens, decoder.dtype, device))
        with unpacking_ahead(ahead):
            beside = _time(lambda: _products(inputs, tokens, decoder.dtype, device))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None, ["matrices are not unpacked ahead: there is no memory for a second buffer"]
    chosen, notes = verdict(ahead, without, beside, largest)
    if chosen:
        workspace.forget(device)  # the buffer in which measuring without it unpacked
    return chosen, notes


def verdict(ahead: Ahead, without: float, beside: float, largest: int) -> tuple[Ahead | None, list[str]]:
    """As `chosen_ahead`, from milliseconds of a block's products. largest: bytes of the largest unpacked matrix."""
    times = (
        f"a block's products take {beside:.2f} ms with the next matrix unpacked beside them, {without:.2f} ms without"
    )
    second = f"the plan's second buffer of {largest / 1e9:.2f} GB"
    if beside > _WORTH * without:
        return None, [f"{times}: it is not, and {second} is not needed"]
    return ahead, [f"{times}: it is, in {second}"]


def _products(inputs: list[list[PackedWeight]], tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    """The products of a block's forward and backward."""
    for weights in inputs:
        x = torch.ones(tokens, weights[0].shape[1], dtype=dtype, device=device)
        made = [sum_of_products([x], [weight], transposed=False) for weight in weights]
        del x
        sum_of_products(made, weights, transposed=True)


@torch.no_grad()
def _time(work: Callable[[], None]) -> float:
    """Milliseconds, the best of a few runs. Two runs before warm up, and show the order in which matrices are used."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found = []
    for _ in range(_ROUNDS + 2):
        begin.record()
        work()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return min(found[2:])
