"""What tests of reading a format share with those of writing it; libraries are loaded where they are needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def base_of(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a model type -> a Hugging Face directory of it; see `peft_models.write_base`."""
    from tests.checkpoint.formats.peft_models import write_base

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = write_base(name, tmp_path_factory.mktemp(name), tiny_base)
        return made[name]

    return make


@pytest.fixture
def adapter(base_of, tmp_path: Path) -> Path:
    """A plain PEFT adapter that a test may damage."""
    from tests.checkpoint.formats.peft_models import made_by_peft

    return made_by_peft(base_of("llama"), tmp_path / "adapter")[0]


@pytest.fixture(scope="module", params=["llama", "opt"])
def base(request: pytest.FixtureRequest, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of each family that the published QST code knows; see `published_side.write_base`."""
    from tests.checkpoint.formats.published_side import write_base

    return write_base(request.param, tmp_path_factory.mktemp(request.param), tiny_base)


@pytest.fixture(scope="session")
def written(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """A name of `low_bit_models.WRITERS` -> the tiny model, as that writes it; see `low_bit_files.Written`."""
    from tests.checkpoint.formats.low_bit_models import WRITERS

    made = {}

    def write(name: str):
        if name not in made:
            made[name] = WRITERS[name](tiny_base, tmp_path_factory.mktemp("low_bit") / name)
        return made[name]

    return write
