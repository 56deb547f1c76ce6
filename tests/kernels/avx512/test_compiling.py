"""How the library is compiled, kept and found again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from accessory.kernels.avx512 import compiling
from accessory.kernels.avx512.compiling import CannotCompile, compiled_library

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, compiling.COMPILERS)) or os.uname().machine != "x86_64", reason="no compiler for them"
)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache of its own, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiled_library.cache_clear()
    yield tmp_path / "cache" / "accessory"
    compiled_library.cache_clear()


def works() -> bool:
    """Whether the library does what it is asked."""
    compiled_library.cache_clear()
    return compiled_library().attention_workspace_bytes(32, 32, False) > 0


def test_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time the compiler is not run; for other sources it is."""
    assert works()
    (library,) = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(compiling, "_compile", None)
    assert works()
    monkeypatch.setattr(compiling, "FLAGS", ("-O0",))
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        works()
    assert list(cache.iterdir()) == [library]


def test_the_name_covers_sources_headers_and_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A change of any of them compiles anew."""
    found = {compiling._name("g++"), compiling._name("clang++")}
    changed = tmp_path / "vectors.h"
    changed.write_text("// changed")
    for name, value in (("HEADERS", (changed,)), ("SOURCES", (changed,)), ("FLAGS", ("-O0",))):
        with monkeypatch.context() as patch:
            patch.setattr(compiling, name, value)
            found.add(compiling._name("g++"))
    assert len(found) == 5


@pytest.mark.parametrize("size", [0, 1000, 8192])
def test_a_damaged_library_is_compiled_again(cache: Path, size: int) -> None:
    """Cut off, as by a power loss. Loaded, it would end the process."""
    assert works()
    (library,) = cache.iterdir()
    whole = library.read_bytes()
    library.unlink()  # this process has it loaded
    library.write_bytes(whole[:size])
    assert works()
    assert library.read_bytes() == whole


@pytest.mark.parametrize("kind", ["writable by others", "a file", "no home"])
def test_without_a_cache_of_its_own(cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """It compiles for this process alone, and leaves nothing behind, nor loads what others may have put there."""
    cache.parent.mkdir()
    if kind == "writable by others":
        cache.mkdir()
        cache.chmod(0o777)
        content = b"planted"
        name = f"{compiling._name(compiling._compiler())}-{compiling._digest(content)}.so"
        (cache / name).write_bytes(content)
    elif kind == "a file":
        cache.write_bytes(b"")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setenv("TMPDIR", str(cache.parent))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = sorted(cache.parent.rglob("*"))
    assert works()
    assert sorted(cache.parent.rglob("*")) == before


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    """What it said is said, and nothing of it stays."""
    compiler = tmp_path / "old-g++"
    compiler.write_text("#!/bin/sh\necho \"unrecognized option '-mavx512bf16'\" >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(CannotCompile, match=r"old-g\+\+ ended with 1: unrecognized option '-mavx512bf16'"):
        compiled_library()
    assert not list(cache.iterdir())


def test_a_compiler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was asked for is named."""
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(CannotCompile, match=r"\$CXX, icpx, is not on the PATH"):
        compiled_library()


def test_many_at_once(cache: Path) -> None:
    """Ranks that start together on a new machine each get a whole library."""
    code = (
        "from accessory.kernels.avx512.compiling import compiled_library;"
        "print(compiled_library().attention_workspace_bytes(32, 32, False))"
    )
    ranks = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert len({rank.communicate()[0] for rank in ranks}) == 1
    assert [rank.returncode for rank in ranks] == [0] * 4
    assert len(list(cache.iterdir())) == 1
