"""The environment's switches."""

from __future__ import annotations

import pytest

from accessory.errors import ConfigError
from accessory.kernels.switches import switched_on

NAME = "ACCESSORY_A_SWITCH"


@pytest.mark.parametrize(("value", "on"), [(None, True), ("1", True), ("0", False)])
def test_on_and_off(monkeypatch: pytest.MonkeyPatch, value: str | None, on: bool) -> None:
    """Unset, it is on; it is read each time."""
    if value is None:
        monkeypatch.delenv(NAME, raising=False)
    else:
        monkeypatch.setenv(NAME, value)
    assert switched_on(NAME, "these kernels") is on
    monkeypatch.setenv(NAME, "0" if on else "1")
    assert switched_on(NAME, "these kernels") is not on


@pytest.mark.parametrize("value", ["", "off", "2", "true"])
def test_a_strange_value(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """Is said, with what it switches."""
    monkeypatch.setenv(NAME, value)
    with pytest.raises(ConfigError, match=f"{NAME} is {value!r}; expected 1 .use these kernels .* or 0"):
        switched_on(NAME, "these kernels")
