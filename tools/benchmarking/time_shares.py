"""Where the time of a step goes, by torch.profiler: time counts for the innermost labelled call around it.

Our autograd functions carry their names into the profile. What has none there, such as a call of a C function, is
labelled while the step is profiled.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from accessory.data.batch import PackedBatch
from accessory.data.order import GlobalOrder
from accessory.engine import Engine
from accessory.kernels.avx512 import four_bit_product, group_codes_product
from accessory.quant.packed import PackedWeight

CATEGORIES = ("products", "unpacking", "attention", "loss", "rest", "optimizer", "data", "communication")
"""rest: norms, rotations, gates, sums, copies, and Python between them."""
IDLE = "idle"
"""A GPU that waits for its host; beside the categories, and only there."""
_LABEL = "benchmark::"
_OWNERS = {
    **{f"{_LABEL}{category}": category for category in CATEGORIES},
    "_Attend": "attention",  # and _AttendByDocument
    "_LayOut": "attention",  # of documents that share beginnings
    "_Pack": "attention",
    "aten::_scaled_dot_product": "attention",
    "aten::_flash_attention": "attention",
    "torch_attn::": "attention",
    "_ChunkedCrossEntropy": "loss",
    "Optimizer.": "optimizer",
    "aten::_fused_adam": "optimizer",
    "aten::_foreach_": "optimizer",  # the gradients' norm, and their scaling
    "c10d::": "communication",
    "gloo:": "communication",
    "nccl": "communication",
    "record_param_comms": "communication",
    "_dequantize": "unpacking",  # our Triton kernel, launched outside any operation
}
"""Beginning of a call's name -> the category of its time, and of all calls within it down to the next such name."""
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::linear")


def measure(step: Callable[[], object], engine: Engine) -> dict[str, float]:
    """Percent of the time of `step`, which runs one of `engine`'s, by category; their sum is 100.

    On a GPU its kernels' time counts, and `IDLE` is what they leave of the step's.
    """
    device = engine.parameters.device
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with _labels(engine.order), profile(activities=activities) as profiled:
        began = time.perf_counter()
        with record_function("step"):  # whose own time is Python's between the operations
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall = 1e6 * (time.perf_counter() - began)
    spent = dict.fromkeys(CATEGORIES, 0.0)
    for path, microseconds in _moments(profiled.events(), device):
        spent[category_of(path)] += microseconds
    if device.type == "cuda":
        spent[IDLE] = max(wall - sum(spent.values()), 0.0)
    whole = sum(spent.values())
    return {category: 100 * microseconds / whole for category, microseconds in spent.items()}


def category_of(path: Iterable[str]) -> str:
    """The category of time spent in the first name of `path`, which was called from the second, and so on outwards."""
    multiplied = False
    for name in path:
        name = name.removeprefix("autograd::engine::evaluate_function: ")
        owner = next((category for start, category in _OWNERS.items() if name.startswith(start)), None)
        if owner:
            return owner
        multiplied = multiplied or name.startswith(_PRODUCTS)
    return "products" if multiplied else "rest"


def _moments(events: list, device: torch.device) -> Iterator[tuple[list[str], float]]:
    """(names from the inside out, microseconds) of what ran by itself: host operations, or a GPU's kernels."""
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        path, around = [event.name], event.cpu_parent
        while around is not None:
            path.append(around.name)
            around = around.cpu_parent
        if device.type == "cpu":
            yield path, event.self_cpu_time_total
        else:
            yield from (([kernel.name, *path], kernel.duration) for kernel in event.kernels)


@contextmanager
def _labels(order: GlobalOrder) -> Iterator[None]:
    with ExitStack() as stack:
        for packed in (PackedWeight, *_below(PackedWeight)):
            for name in {"unpack_to_buffer", "unpack"} & vars(packed).keys():
                stack.enter_context(_labelled(packed, name, "unpacking"))
        # It unpacks, too: a few columns at a time, which nobody could tell apart.
        for kernel in (four_bit_product, group_codes_product):
            stack.enter_context(_labelled(kernel, "sum_of_products", "products"))
        for name in ("micro_batches", "supervised_tokens", "tokens"):
            stack.enter_context(_labelled(order, name, "data"))
        stack.enter_context(_labelled(PackedBatch, "to", "data"))
        yield


def _below(base: type) -> Iterator[type]:
    for one in base.__subclasses__():
        yield one
        yield from _below(one)


@contextmanager
def _labelled(owner: object, name: str, category: str) -> Iterator[None]:
    """While entered, calls of `owner`'s function `name` are labelled as `category` in the profile."""
    function, own = getattr(owner, name), name in vars(owner)

    @functools.wraps(function)
    def call(*given, **named):
        """Call the function under its label."""
        with record_function(f"{_LABEL}{category}"):
            result = function(*given, **named)
            return iter(list(result)) if inspect.isgenerator(result) else result  # made here, not where it is used

    setattr(owner, name, call)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, function)
        else:
            delattr(owner, name)
