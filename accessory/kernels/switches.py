"""Environment variables that switch kernels off."""

from __future__ import annotations

import os

from accessory.errors import ConfigError


def switched_on(variable: str, kernels: str) -> bool:
    """Whether `variable` leaves `kernels` on, as it does if unset. Raises `ConfigError` for an invalid value."""
    value = os.environ.get(variable, "1")
    if value not in ("0", "1"):
        raise ConfigError(f"{variable} is {value!r}; expected 1 (use {kernels} where they work) or 0 (never).")
    return value == "1"
