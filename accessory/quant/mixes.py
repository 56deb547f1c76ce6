"""Mixes: most linears have 2 bits, those that suffer most from it have 4. Names after the mean bits of a code."""

from __future__ import annotations

from accessory.quant.groups import group_storage

NARROW, WIDE = group_storage(2, 64), group_storage(4, 128)
MIXES = {"mix2.2": 0.1, "mix2.5": 0.25, "mix3.0": 0.5}
"""Name in `--quant_type` -> the most that linears of four bits hold of the blocks' weights.

Which ones these are is for each model to choose: `accessory.checkpoint.strategy` reads the choice.
"""
