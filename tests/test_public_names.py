"""`from accessory import ...`: public names, which import PyTorch only when they are used."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import accessory

ROOT = Path(__file__).resolve().parent.parent


def test_every_public_name_is_there() -> None:
    found = {name: getattr(accessory, name) for name in accessory.__all__}
    assert [found["MetaModel"].__module__, found["AccessoryError"].__module__] == ["accessory.meta", "accessory.errors"]
    with pytest.raises(AttributeError, match="MetaModle"):
        _ = accessory.MetaModle


def test_importing_brings_no_torch(python) -> None:
    done = python("-c", "import accessory, sys; print(accessory.__version__, 'torch' in sys.modules)")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert done.stdout.split() == [version, "False"], done.stderr
