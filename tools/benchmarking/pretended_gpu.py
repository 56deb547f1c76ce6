"""A GPU that is not there: a process in which tensors on `cuda` have shapes and no numbers, and nothing is launched.

`load` comes before anything imports torch; `pretended` is the context in which such tensors are made.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

_SOURCE = Path(__file__).with_suffix(".cpp")
PROCESSORS, CAPABILITY = 132, (9, 0)  # of an H200


def load() -> None:
    """Make PyTorch without CUDA believe in a GPU (see the C++ file); one with CUDA pretends by itself.

    Raises `RuntimeError` if torch is loaded already, or where there is no compiler.
    """
    if "torch" in sys.modules:
        raise RuntimeError("tools.benchmarking.pretended_gpu.load comes before torch is imported.")
    root = Path(find_spec("torch").origin).parent
    if (root / "lib" / "libtorch_cuda.so").exists():
        return
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise RuntimeError("There is no g++ on the PATH, which a pretended GPU needs.")
    with tempfile.TemporaryDirectory(prefix="accessory-") as directory:
        made = Path(directory) / "pretended_gpu.so"
        given = [f"-I{root / 'include'}", str(_SOURCE), "-o", str(made), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
        options = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-Wl,-rpath,{root / 'lib'}"]
        done = subprocess.run([compiler, *options, *given], capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise RuntimeError(f"{compiler} ended with {done.returncode}: {done.stderr.strip()[:1000]}")
        ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)


@contextmanager
def pretended(triton: bool) -> Iterator[None]:
    """Inside this context tensors are fake. triton: whether Triton's kernels work on the pretended GPU."""
    import torch

    from accessory import kernels
    from accessory.kernels import fused_attention

    class Event:
        """A CUDA event whose work is always done already."""

        def record(self, stream: object = None) -> None:
            """Do nothing: there is no work to mark."""

        def synchronize(self) -> None:
            """Return at once: there is no work to wait for."""

    properties = SimpleNamespace(multi_processor_count=PROCESSORS, major=CAPABILITY[0], minor=CAPABILITY[1])
    answers = {
        "is_initialized": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda _device=None: properties,
        "get_device_capability": lambda _device=None: CAPABILITY,
        "max_memory_allocated": lambda _device=None: 0,
    }
    with ExitStack() as held:
        held.enter_context(patch.object(torch.cuda, "Event", Event))
        for name, answer in answers.items():
            held.enter_context(patch.object(torch.cuda, name, answer))
        works = lambda _device, _dtype, names: frozenset(names if triton else ())  # noqa: E731
        held.enter_context(patch.object(kernels.triton, "_tried", works))
        fused = lambda _device, dtype, width: fused_attention.fused_for(CAPABILITY, dtype, width)  # noqa: E731
        held.enter_context(patch.object(fused_attention, "_tried", fused))
        kernels._fast.cache_clear()
        held.callback(kernels._fast.cache_clear)
        held.enter_context(_fake_tensors())
        held.enter_context(_answers())
        yield


@cache  # one for the process, because modules keep its tensors
def _fake_tensors() -> AbstractContextManager:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@cache
def _answers() -> AbstractContextManager:
    """Answers what fake tensors cannot: every number is 1, every condition holds everywhere, pinned memory is known."""
    import torch
    from torch import Tensor
    from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten, tree_map_only

    class Answers(TorchDispatchMode):
        """What the function says."""

        pinned: ClassVar[dict[int, torch.UntypedStorage]] = {}  # held, so that no address is reused

        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            kwargs, name = kwargs or {}, func._schema.name
            if kwargs.get("pin_memory"):
                return self.pin(func(*args, **{**kwargs, "pin_memory": False}))
            given = next((x for x in tree_flatten((args, kwargs))[0] if isinstance(x, FakeTensor)), None)
            if given is None:
                return func(*args, **kwargs)
            if name == "aten::_pin_memory":
                return self.pin(torch.empty_like(given))
            if name == "aten::is_pinned":
                return given.untyped_storage()._cdata in self.pinned
            if name == "aten::_local_scalar_dense":
                return 1.0 if given.is_floating_point() else True if given.dtype == torch.bool else 1
            if name == "aten::nonzero":
                return given.new_empty((given.numel(), given.dim()), dtype=torch.int64)
            if name.startswith("bitsandbytes::") and func._overloadname == "out":
                return None  # bitsandbytes 0.50's own fake operation misreads a shape given as a list
            if name.startswith("c10d::"):  # with one process a collective changes nothing
                with unset_fake_temporarily():
                    done = func(*tree_map_only(Tensor, lambda _: torch.zeros(1), args), **kwargs)
                return (args[0], *done[1:]) if isinstance(done, tuple) else done
            return func(*args, **kwargs)

        def pin(self, tensor: Tensor) -> Tensor:
            """Remember that it is pinned; returns it."""
            storage = tensor.untyped_storage()
            self.pinned[storage._cdata] = storage
            return tensor

    return Answers()
