"""bitsandbytes' functions, loaded without torch's compiler.

At import it passes some functions to torch.compile, which loads the whole compiler: almost two seconds of every start,
for functions that are hardly ever called. Here torch.compile waits until one is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def _compile_at_first_call(function: Callable | None = None, **options: Any) -> Callable:
    """`torch.compile`, as a decorator with or without options."""
    if function is None:
        return lambda decorated: _compile_at_first_call(decorated, **options)
    compiled = functools.cache(lambda: _compile(function, **options))

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        return compiled()(*given, **named)

    return call


_compile = torch.compile
torch.compile = _compile_at_first_call
try:
    import bitsandbytes.functional as functional
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
finally:
    torch.compile = _compile

__all__ = ["ErrorHandlerMockBNBNativeLibrary", "functional", "lib"]
