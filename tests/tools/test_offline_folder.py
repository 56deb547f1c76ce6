"""tools/offline_folder.py, without a network: what of its wheels lies in the folder."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from accessory.errors import ConfigError
from tools import offline_folder

LIBRARIES = ("cpu", "cuda118", "cuda130", "rocm63")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """From here on two wheels are what pip would download; returns a folder that is not there yet."""
    found = []
    for name, files in {
        "bitsandbytes-1-py3-none-any.whl": ["bitsandbytes/__init__.py", *map(_library, LIBRARIES)],
        "fire-2-py3-none-any.whl": ["fire/core.py", "fire-2.dist-info/METADATA"],
    }.items():
        found.append(tmp_path / name)
        with zipfile.ZipFile(found[-1], "w") as packed:
            for file in files:
                packed.writestr(file, "x" * 1000)
    monkeypatch.setattr(offline_folder, "_download", lambda aside, python: found)
    return tmp_path / "site"


def _library(kind: str) -> str:
    return f"bitsandbytes/libbitsandbytes_{kind}.so"


def test_one_library_for_cuda(wheels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    offline_folder.main(str(wheels), cuda="13.0")
    assert sorted(path.relative_to(wheels).as_posix() for path in wheels.rglob("*") if path.is_file()) == [
        "bitsandbytes/__init__.py", _library("cpu"), _library("cuda130"), "fire-2.dist-info/METADATA", "fire/core.py",
    ]  # fmt: skip
    assert capsys.readouterr().out == f"{wheels}: 2 packages for Python 3.12, 0.0 MB\n"


def test_what_is_refused(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release of CUDA that bitsandbytes has no library for, no release at all, and too much of everything."""
    with pytest.raises(ConfigError, match=r"--cuda 12\.1: bitsandbytes-1-.* has libraries for cpu, cuda118, cuda130"):
        offline_folder.main(str(wheels), cuda="12.1")
    with pytest.raises(ConfigError, match=r"--python 312 --cuda 13\.0: expected releases such"):
        offline_folder.main(str(wheels), python="312")
    monkeypatch.setattr(offline_folder, "MOST", 3000)
    with pytest.raises(ConfigError, match=r"would have 0\.0 MB; expected 0 at most"):
        offline_folder.main(str(wheels))
    assert not wheels.exists()


def test_every_package_is_pinned() -> None:
    """The releases are those that Accessory is tested with."""
    pins = offline_folder._pins()
    for name in (*offline_folder.WITH_NEEDS, *offline_folder.ALONE, *offline_folder.FROM_SOURCE):
        assert pins[name.lower()].lower().startswith(f"{name.lower()}==")
