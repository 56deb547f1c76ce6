"""The C++ files of this directory as a library: compiled at the first use on a machine, and kept for the next.

Its plain C functions take addresses and sizes, so it does not depend on PyTorch's or Python's version, compiles in
eleven seconds and, compiled by g++, shares PyTorch's OpenMP threads, whose library is loaded already.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cpp")))
HEADERS = tuple(sorted(Path(__file__).parent.glob("*.h")))
COMPILERS = ("g++", "clang++", "c++")
FLAGS = (
    "-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp", "-mfma", "-mavx2", "-mavx512f", "-mavx512bw", "-mavx512dq",
    "-mavx512vl", "-mavx512bf16", "-ffp-contract=off",  # scales are rounded as when matrices are unpacked
)  # fmt: skip
_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "b": ctypes.c_bool}


class CannotCompile(Exception):
    """There is no compiler, or it fails; the text says which and why."""


@lru_cache
def compiled(name: str, arguments: str, result: type | None = None) -> ctypes._CFuncPtr:
    """The C function `name`. Raises `CannotCompile`.

    arguments: a letter each, p for an address, n int64, f float, b bool.
    """
    function = getattr(compiled_library(), name)
    function.argtypes, function.restype = [_TYPES[letter] for letter in arguments], result
    return function


@lru_cache
def compiled_library() -> ctypes.CDLL:
    """The loaded library. Raises `CannotCompile`."""
    compiler = _compiler()
    directory = _own_cache()
    if directory is not None:
        with suppress(OSError, CannotCompile):  # a full disk, or one that nothing may be loaded from
            return ctypes.CDLL(str(_kept(directory, compiler) or _compile(compiler, directory)))
    try:
        with tempfile.TemporaryDirectory(prefix="accessory-") as temporary:  # what is loaded needs its file no longer
            return ctypes.CDLL(str(_compile(compiler, Path(temporary))))
    except OSError as error:
        raise CannotCompile(str(error)) from error


def _compiler() -> list[str]:
    """The compiler's path, and options from $CXX."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for name, *options in [wanted] if wanted else [[name] for name in COMPILERS]:
        if found := shutil.which(name):
            return [found, *options]
    missing = f"$CXX, {wanted[0]}, is not" if wanted else f"none of {', '.join(COMPILERS)} is"
    raise CannotCompile(f"{missing} on the PATH; install g++")


def _name(compiler: list[str]) -> str:
    """The library's name up to its own digest: a digest of all that it is made from."""
    parts = [*compiler, *FLAGS, *(file.read_text(encoding="utf-8") for file in SOURCES + HEADERS)]
    return f"avx512-{_digest(chr(0).join(parts).encode())}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _kept(directory: Path, compiler: list[str]) -> Path | None:
    """The library compiled before, if only we can change it and it is complete: loading part of one may crash."""
    kept = filter(_private, directory.glob(f"{_name(compiler)}-*.so"))
    return next((file for file in kept if file.stem.endswith(f"-{_digest(file.read_bytes())}")), None)


def _own_cache() -> Path | None:
    """A directory that nobody else can write into or replace, because its files are loaded; None if there is none."""
    try:
        around = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = around / "accessory"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory = directory.resolve()
        safe = _private(directory) and not directory.parent.stat().st_mode & stat.S_IWOTH
    except (OSError, RuntimeError):  # a home that cannot be written into, or none
        return None
    return directory if safe and os.access(directory, os.W_OK) else None


def _private(path: Path) -> bool:
    """Whether only this user, or root, can change it."""
    found = path.stat()
    return found.st_uid in (os.getuid(), 0) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _compile(compiler: list[str], directory: Path) -> Path:
    """Compile into a new file in `directory`, which gets its final name when it is complete."""
    handle, name = tempfile.mkstemp(prefix="compiling-", suffix=".so", dir=directory)
    os.close(handle)
    made = Path(name)
    try:
        done = subprocess.run(
            [*compiler, *FLAGS, *map(str, SOURCES), "-o", name], capture_output=True, text=True, errors="replace"
        )
        if done.returncode:
            raise CannotCompile(f"{compiler[0]} ended with {done.returncode}: {done.stderr.strip()[:1000]}")
        ctypes.CDLL(name)  # before it gets its name
        return made.replace(directory / f"{_name(compiler)}-{_digest(made.read_bytes())}.so")
    finally:
        made.unlink(missing_ok=True)
