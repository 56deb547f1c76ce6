"""What every test of memory runs in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from accessory.parallel import groups
from accessory.parallel.groups import Layout


@pytest.fixture(scope="module", autouse=True)
def layout() -> Iterator[Layout]:
    """This process alone, on the CPU."""
    yield groups.start("cpu")
    groups.stop()
