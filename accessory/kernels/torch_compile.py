"""Elementwise functions that torch.compile fuses into one pass over memory, if `--compile` asks for it.

Whole blocks are left alone: their products gain nothing, and every new set of document lengths would be compiled anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")
_wanted = False


def compile_fusible(wanted: bool) -> bool:
    """From now on, compile what is `fusible` at its first use, or leave it plain; returns what was wanted before."""
    global _wanted
    before, _wanted = _wanted, wanted
    return before


def fusible(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function`, or what torch.compile makes of it for tensors of any length, while that is wanted."""
    compiled = functools.cache(lambda: torch.compile(function, dynamic=True))  # loads the compiler, so only if wanted

    @functools.wraps(function)
    def choose(*given: object) -> Result:
        """Call the one that is wanted now."""
        return (compiled() if _wanted else function)(*given)

    return choose
