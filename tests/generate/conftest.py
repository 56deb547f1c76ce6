"""What tests of generation share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from accessory.parallel import groups


@pytest.fixture(scope="module", autouse=True)
def layout() -> Iterator[groups.Layout]:
    """This process alone, on the CPU."""
    yield groups.start("cpu")
    groups.stop()
