"""Every kernel in plain PyTorch and in C++ against float64, by functions of the same names and signatures."""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

from accessory.kernels import avx512, triton
from tests import cpu_kernels
from tests.kernels.formulas import FORMULAS, ON_THEIR_OWN, check

PACKAGES = {"avx512": avx512.KERNELS, "triton": triton.KERNELS}
PLAIN = [name for name in FORMULAS if name not in ON_THEIR_OWN]
PLAIN_ALONE = {"by_document."}  # what PyTorch's own attention kernels are tried against


def implementation(package: str, name: str) -> ModuleType:
    """The module."""
    return import_module(f"accessory.kernels.{package}.{name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_pytorch(name: str, dtype: torch.dtype) -> None:
    """In both widths."""
    check(name, implementation("plain", name), dtype)


@pytest.mark.parametrize("name", avx512.KERNELS)
def test_this_cpus(name: str) -> None:
    """In bf16."""
    cpu_kernels.require()
    check(name, implementation("avx512", name), torch.bfloat16)


def face(module: ModuleType, made_elsewhere: bool = False) -> dict[str, inspect.Signature]:
    """The public functions, and a public class's methods, of a module and their signatures.

    made_elsewhere: those too that it has from another one.
    """
    found = {}
    for name, thing in vars(module).items():
        if name.startswith("_") or not (made_elsewhere or getattr(thing, "__module__", None) == module.__name__):
            continue
        members = vars(thing).items() if inspect.isclass(thing) else [("", thing)]
        named = {f"{name}.{member}": f for member, f in members if inspect.isfunction(f)}
        found |= {key: inspect.signature(f) for key, f in named.items() if not key.split(".")[1].startswith("_")}
    return found


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package, names in PACKAGES.items() for name in names if name in PLAIN]
)
def test_signatures_are_plain_pytorchs(package: str, name: str) -> None:
    """Whatever more an implementation has, it has all that plain PyTorch's has, and takes the same."""
    if package == "triton" and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    wanted, found = face(implementation("plain", name)), face(implementation(package, name), made_elsewhere=True)
    assert wanted
    for key in wanted.keys() - PLAIN_ALONE:
        assert found.get(key) == wanted[key], key


def test_every_kernel_has_a_plain_one_and_a_formula() -> None:
    """Or a machine without a kernel could not compute."""
    files = {path.stem for path in Path(avx512.__file__).parents[1].joinpath("plain").glob("*.py")}
    assert files >= set(PLAIN)
    assert set(FORMULAS) >= {*avx512.KERNELS, *triton.KERNELS}
