"""Tiny random encoders, written by transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from accessory.parallel import groups
from accessory.parallel.groups import Layout
from tests.vision.tiny import write_blip2, write_clip


def pytest_pycollect_makemodule() -> None:
    """Skip this directory where the libraries of image encoders are missing, which its files import."""
    for library in ("transformers", "PIL"):
        pytest.importorskip(library, reason="the extra vision is not installed")


@pytest.fixture(scope="session", autouse=True)
def layout() -> Iterator[Layout]:
    """This process alone, on the CPU."""
    yield groups.start("cpu")
    groups.stop()


@pytest.fixture(scope="session")
def blip2(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """transformers' BLIP-2, and the directory that it wrote."""
    path = tmp_path_factory.mktemp("blip2")
    return write_blip2(path), path


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """transformers' CLIP, and the directory that it wrote."""
    path = tmp_path_factory.mktemp("clip")
    return write_clip(path), path
