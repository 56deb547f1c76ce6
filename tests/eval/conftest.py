"""A tiny model in fp32, and texts of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from accessory.meta import MetaModel
from accessory.parallel import groups


@pytest.fixture(scope="session")
def model(tiny_base: Path) -> Iterator[MetaModel]:
    """`tiny_base`, alone on the CPU, with room for 128 tokens."""
    groups.start("cpu")
    yield MetaModel.from_pretrained(tiny_base, dtype="fp32", max_seq_len=128, device="cpu")
    groups.stop()
