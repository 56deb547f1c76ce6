"""Counts what a GPU is asked for while some code runs: kernel launches, bytes they read and write, and waits for it.

Every operation of PyTorch passes here, on real tensors or on fake ones (`tools/benchmarking/pretended_gpu.py`); views,
allocations and metadata count nothing. Triton's kernels are counted where they are launched. How many launches an
operation makes is what PyTorch's source says (2.11 to 2.13): one, unless a rule below says otherwise. A library's
product or a sort counts as one, whatever it launches inside.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_FREE = {
    "aten::alias", "aten::detach", "aten::lift_fresh", "aten::_unsafe_view", "aten::is_pinned", "aten::is_same_size",
    "aten::record_stream", "aten::set_", "aten::resize_", "aten::empty", "aten::empty_like", "aten::empty_strided",
    "aten::new_empty", "aten::new_empty_strided", "aten::_pin_memory",
}  # fmt: skip
_FREE_NAMESPACES = ("prim", "profiler")
_COPIES = ("aten::_to_copy", "aten::copy_")
_OVERWRITE = {
    f"aten::{name}_" for name in ("copy", "fill", "zero", "normal", "uniform", "random", "bernoulli", "exponential")
} | {"aten::_foreach_copy_"}
"""In-place operations that do not read what they overwrite."""
_GATHER = {"aten::embedding", "aten::index_select", "aten::index", "aten::gather"}
"""Operations that read of their first tensor only as much as the result holds."""
_SCATTER = {
    f"aten::{name}_": adds
    for name, adds in {"index_copy": 0, "index_put": 0, "scatter": 0, "index_add": 1, "scatter_add": 1}.items()
}
"""Operations that write, or read and write, of their first tensor only as much as the last one holds."""
_LAUNCHES = {
    "aten::nonzero": 2,  # counts, then writes; the host waits for the count in between
    "aten::_flash_attention_backward": 3,  # dout x out, the gradients, dq rounded
    "aten::_scaled_dot_product_flash_attention_backward": 3,
    "torch_attn::_varlen_attn_backward": 3,
    "aten::_scaled_dot_product_cudnn_attention_backward": 3,
    "aten::_efficient_attention_backward": 2,
    "aten::_scaled_dot_product_efficient_attention_backward": 2,
}
_FEW_ROWS = 3072  # indices up to which an embedding's gradient is one kernel; beyond it they are sorted first
_SORTED_EMBEDDING, _SORTED_PUT = 7, 5
_TENSORS_A_LAUNCH, _BLOCKS_A_LAUNCH, _CHUNK = (110, 64, 48, 36, 30), 320, 65536
"""PyTorch's multi-tensor launches: tensors for 1 to 5 lists, blocks, and numbers of a block."""
_BOTH_WAYS = {"become_gradient": ("scores",), "_gradient": ("scores",)}
"""Triton kernels -> their arguments that are both read and written."""


@dataclass
class Counts:
    """launches: of kernels, and copies between host and GPU. bytes: that they read and write. syncs: waits."""

    launches: int = 0
    bytes: int = 0
    syncs: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.launches + other.launches, self.bytes + other.bytes, self.syncs + other.syncs)

    def __sub__(self, other: Counts) -> Counts:
        return Counts(self.launches - other.launches, self.bytes - other.bytes, self.syncs - other.syncs)


class LaunchCounter(TorchDispatchMode):
    """Inside this context everything on devices of a type is counted, in `found`: (phase, operation) -> counts.

    The phase is "backward" inside a backward, else "forward" inside a module given to `watch`, else "rest".
    """

    def __init__(self, device_type: str = "cuda") -> None:
        super().__init__()
        self.device_type = device_type
        self.found: dict[tuple[str, str], Counts] = defaultdict(Counts)
        self._inside = 0  # watched modules that are running
        self._held: ExitStack | None = None

    @property
    def phase(self) -> str:
        """The phase at this moment."""
        if torch._C._current_graph_task_id() != -1:  # it has no public name (torch 2.13)
            return "backward"
        return "forward" if self._inside else "rest"

    def total(self, phase: str | None = None) -> Counts:
        """The counts of a phase, or of all."""
        return sum((counts for (when, _), counts in self.found.items() if phase in (None, when)), Counts())

    def clear(self) -> None:
        """Forget what was counted."""
        self.found.clear()

    @contextmanager
    def watch(self, module: nn.Module) -> Iterator[None]:
        """Inside this context `module`'s forwards are the phase "forward"."""

        def enter(*_given: Any) -> None:
            """A forward begins."""
            self._inside += 1

        def leave(*_given: Any) -> None:
            """It ends."""
            self._inside -= 1

        hooks = module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __enter__(self) -> LaunchCounter:
        with ExitStack() as held:
            if "triton" in sys.modules:
                from triton.runtime.jit import JITFunction

                run = JITFunction.run

                def launch(kernel: JITFunction, *given: Any, **named: Any) -> Any:
                    """As `JITFunction.run`."""
                    return self._launch(run, kernel, given, named)

                held.enter_context(patch.object(JITFunction, "run", launch))
            wait = torch.cuda.Event.synchronize

            def waits(event: Any) -> None:
                """As `torch.cuda.Event.synchronize`."""
                self._add("event", 0, 0, 1)
                wait(event)

            held.enter_context(patch.object(torch.cuda.Event, "synchronize", waits))
            synchronize = torch.cuda.synchronize
            held.enter_context(patch.object(torch.cuda, "synchronize", lambda *given: self._wait(synchronize, given)))
            super().__enter__()
            self._held = held.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._held.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Count an operation, and have it done."""
        kwargs, name = kwargs or {}, func._schema.name
        result = func(*args, **kwargs)
        if name.partition("::")[0] not in _FREE_NAMESPACES and name not in _FREE and not _is_view(func):
            self._count(func, name, args, kwargs, result)
        return result

    def _here(self, values: Any) -> list[Tensor]:
        """The distinct tensors among `values` on the devices that are counted."""
        flat = (x for x in tree_flatten(values)[0] if isinstance(x, Tensor) and x.device.type == self.device_type)
        return list({id(x): x for x in flat}.values())

    def _count(self, func: Any, name: str, args: tuple, kwargs: dict, result: Any) -> None:
        here = self._here((args, kwargs, result))
        if not here:
            return
        if name in _COPIES and (sync := self._transfer(name, args, kwargs, result)) is not None:
            self._add(name.removeprefix("aten::") + " between host and GPU", 1, here[0].nbytes, sync)
        elif name == "aten::_local_scalar_dense":
            self._add("item", 1, here[0].element_size(), 1)
        else:
            waits = name == "aten::nonzero" or (name == "aten::index" and _by_condition(args[1]))
            self._add(name.removeprefix("aten::"), *_cost(func, name, args, kwargs, result, self._here), int(waits))

    def _transfer(self, name: str, args: tuple, kwargs: dict, result: Tensor) -> int | None:
        """How often the host waits for a copy to or from a GPU; None if it is none.

        PyTorch itself allocates pinned memory for a copy from the GPU that need not wait.
        """
        into, source = (result, args[0]) if name == "aten::_to_copy" else (args[0], args[1])
        if {into.device.type, source.device.type} != {self.device_type, "cpu"} or self.device_type == "cpu":
            return None
        host = source if source.device.type == "cpu" else into
        waits_not = kwargs.get("non_blocking", len(args) > 2 and name == "aten::copy_" and args[2])
        made = name == "aten::_to_copy" and host is into
        return 0 if waits_not and (made or host.is_pinned()) else 1

    def _add(self, operation: str, launches: int, moved: int, syncs: int = 0) -> None:
        if launches or moved or syncs:
            self.found[self.phase, operation] += Counts(launches, moved, syncs)

    def _wait(self, synchronize: Any, given: tuple) -> None:
        self._add("synchronize", 0, 0, 1)
        if torch.cuda.is_available():
            synchronize(*given)

    def _launch(self, run: Any, kernel: Any, given: tuple, named: dict) -> Any:
        """Count a Triton kernel's launch; on fake tensors nothing is launched."""
        tensors = self._here((given, named))
        name = kernel.fn.__name__
        twice = [x for n, x in zip(kernel.arg_names, given, strict=False) if n in _BOTH_WAYS.get(name, ())]
        moved = sum(map(_nbytes, tensors)) + sum(map(_nbytes, self._here(twice)))
        self._add(f"triton::{kernel.fn.__module__.rpartition('.')[2]}.{name.strip('_')}", 1, moved)
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return None
        return run(kernel, *given, **named)


def _is_view(func: Any) -> bool:
    return any(found.alias_info is not None and not found.alias_info.is_write for found in func._schema.returns)


def _by_condition(indices: Iterable[Tensor | None]) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


def _nbytes(tensor: Tensor) -> int:
    """The bytes that lie in memory, where expanded dimensions count once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return prod(sizes) * tensor.element_size() if tensor.numel() else 0


def _cost(func: Any, name: str, args: tuple, kwargs: dict, result: Any, here: Any) -> tuple[int, int]:
    """(launches, bytes read and written) of an operation. here: tensors on the counted device."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    changed, overwritten = [], []
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name in named:
            fresh = (
                argument.is_out or name in _OVERWRITE or (name == "aten::_fused_adamw_" and argument.name == "grads")
            )
            (overwritten if fresh else changed).extend(here(named[argument.name]))
    known = {id(tensor) for tensor in changed + overwritten}
    read = [tensor for tensor in here((args, kwargs)) if id(tensor) not in known]
    made = [tensor for tensor in here(result) if id(tensor) not in known]
    moved = sum(map(_nbytes, read + made + overwritten)) + 2 * sum(map(_nbytes, changed))
    first = here(args)[0] if here(args) else None
    if name in _GATHER and made and first is not None:
        moved += min(_nbytes(made[0]) - _nbytes(first), 0)
    if name in _SCATTER and read:
        source = read[-1]
        moved += (1 + _SCATTER[name]) * _nbytes(source) - 2 * _nbytes(first)
    if name == "aten::addmm" and named["self"].dim() == 2:  # the first tensor is copied into the result first
        moved += 2 * _nbytes(made[0]) if made else 0
    return _launches(name, named, read, here), moved


def _launches(name: str, named: dict, read: list[Tensor], here: Any) -> int:
    if name.startswith("aten::_foreach_") or name.startswith("aten::_fused_"):
        lists = [here(value) for value in named.values() if isinstance(value, (list, tuple)) and here(value)]
        lists = [tensors for tensors in lists if any(tensor.dim() for tensor in tensors)] or lists[:1]
        cleanup = name == "aten::_foreach_norm"
        return multi_tensor_launches([tensor.numel() for tensor in lists[0]], len(lists)) + cleanup
    if name == "aten::native_layer_norm_backward":
        mask = named["output_mask"]
        return int(mask[0]) + int(mask[1] or mask[2])
    if name == "aten::addmm":
        return 2 if named["self"].dim() == 2 else 1
    if name == "aten::embedding_dense_backward":
        return 1 if named["indices"].numel() <= _FEW_ROWS else _SORTED_EMBEDDING
    if name == "aten::index_put_":
        return _SORTED_PUT if named.get("accumulate") else 1
    return _LAUNCHES.get(name, 1)


def multi_tensor_launches(sizes: list[int], lists: int) -> int:
    """Launches of an operation on `lists` lists of tensors of such sizes, as PyTorch's multi_tensor_apply makes."""
    most = _TENSORS_A_LAUNCH[min(lists, len(_TENSORS_A_LAUNCH)) - 1]
    launches = tensors = blocks = 0
    for size in filter(None, sizes):
        tensors += 1
        chunks = -(-size // _CHUNK)
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if blocks == _BLOCKS_A_LAUNCH or (last and tensors == most):
                launches, blocks, tensors = launches + 1, 0, 0 if last else 1
    return launches + (blocks > 0)
