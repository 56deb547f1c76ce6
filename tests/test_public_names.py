"""`from accessory import ...`: public names, which import PyTorch only when they are used."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import accessory

ROOT = Path(__file__).resolve().parent.parent


def test_every_public_name_is_there() -> None:
    found = {name: getattr(accessory, name) for name in accessory.__all__}
    assert all(callable(found[name]) for name in found if name != "__version__")
    assert {name: value.__module__ for name, value in found.items() if callable(value)} == accessory._HOMES
    with pytest.raises(AttributeError, match="MetaModle"):
        _ = accessory.MetaModle


def test_no_module_hides_a_public_name() -> None:
    """Python binds a submodule to its package when it is first imported, over whatever `__getattr__` would give."""
    modules = {path.stem for path in (ROOT / "accessory").iterdir()}
    assert not modules & set(accessory.__all__)
    assert set(accessory.__all__) <= set(dir(accessory))


def test_names_are_also_where_upstream_has_them() -> None:
    from accessory.model import meta, multi_gpu_wrapper

    assert meta.MetaModel is accessory.MetaModel
    assert multi_gpu_wrapper.MultiGpuWrapper is accessory.MultiGpuWrapper


def test_importing_brings_no_torch(python) -> None:
    done = python("-c", "import accessory, sys; print(accessory.__version__, 'torch' in sys.modules)")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert done.stdout.split() == [version, "False"], done.stderr
