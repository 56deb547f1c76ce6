"""How the library is compiled, kept and found again."""

from __future__ import annotations

import ctypes
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
    """A cache of its own, empty; and one short source, for what is the same with all."""
    monkeypatch.setattr(compiling, "SOURCES", tuple(file for file in compiling.SOURCES if file.stem == "column_sums"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiled_library.cache_clear()
    yield tmp_path / "cache" / "accessory"
    compiled_library.cache_clear()


def works() -> bool:
    """Whether the library does what it is asked."""
    compiled_library.cache_clear()
    return hasattr(compiled_library(), "column_sums")


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
    found = {compiling._name(["g++"]), compiling._name(["clang++"]), compiling._name(["g++", "-m64"])}
    changed = tmp_path / "vectors.h"
    changed.write_text("// changed")
    for name, value in (("HEADERS", (changed,)), ("SOURCES", (changed,)), ("FLAGS", ("-O0",))):
        with monkeypatch.context() as patch:
            patch.setattr(compiling, name, value)
            found.add(compiling._name(["g++"]))
    assert len(found) == 6


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


@pytest.mark.parametrize("kind", ["writable by others", "in one that is", "of another user", "a file", "no home"])
def test_without_a_cache_of_its_own(cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """It compiles for this process alone, and leaves nothing behind, nor loads what others may have put there."""
    cache.parent.mkdir()
    if kind == "a file":
        cache.write_bytes(b"")
    elif kind == "no home":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    else:
        cache.mkdir(mode=0o700)
        content = b"planted"
        (cache / f"{compiling._name(compiling._compiler())}-{compiling._digest(content)}.so").write_bytes(content)
        if kind == "of another user":
            monkeypatch.setattr(os, "getuid", lambda: 4321)
            monkeypatch.setattr(compiling, "_private", lambda path, own=compiling._private: own(path) and path != cache)
        else:
            (cache if kind == "writable by others" else cache.parent).chmod(0o777)
    elsewhere = cache.parent.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    before = sorted(cache.parent.rglob("*"))
    assert works()
    assert sorted(cache.parent.rglob("*")) == before
    assert not list(elsewhere.iterdir())


def test_a_planted_library_is_not_loaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may write to it, though not into the directory: it was there before that was closed."""
    assert works()
    (library,) = cache.iterdir()
    library.chmod(0o666)
    compiled = []
    compile_again = compiling._compile
    monkeypatch.setattr(compiling, "_compile", lambda *given: compiled.append(given) or compile_again(*given))
    assert works()
    assert len(compiled) == 1


def test_a_cache_that_nothing_can_be_loaded_from(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a mount without the right to execute, or a full one: a temporary directory may do."""
    load = ctypes.CDLL

    def refuse(name: str) -> ctypes.CDLL:
        if name.startswith(str(cache)):
            raise OSError("failed to map segment from shared object")
        return load(name)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert works()
    assert not list(cache.iterdir())


SCRIPTS = {
    "fails": ("echo \"unrecognized option '-mavx512bf16'\" >&2; exit 1", r"ended with 1: unrecognized option '-mavx5"),
    "fails in Latin-1": (r"printf 'Fehler: \344' >&2; exit 1", "ended with 1: Fehler: \ufffd"),
    "takes its output away": (
        'for o; do :; done; rm "$o"; echo ld: cannot find -lgomp >&2; exit 1',
        "cannot find -lgomp",
    ),
    "makes no library": ('for o; do :; done; echo nothing > "$o"', "invalid ELF header|file too short"),
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path, kind: str) -> None:
    """What it said is said, and nothing of it stays."""
    script, said = SCRIPTS[kind]
    compiler = tmp_path / "old-g++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(CannotCompile, match=said):
        compiled_library()
    assert not list(cache.iterdir())


def test_a_compiler_with_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """As $CXX often has."""
    monkeypatch.setenv("CXX", f"{compiling._compiler()[0]} -m64")
    assert works()


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
    ranks = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert len({rank.communicate()[0] for rank in ranks}) == 1
    assert [rank.returncode for rank in ranks] == [0] * 2
    assert len(list(cache.iterdir())) == 1
