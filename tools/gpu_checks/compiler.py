"""The process that compiles a share of Triton's kernels for a GPU, which it neither needs nor touches.

A variant of a kernel is made for certain dtypes and constants, and for sizes and addresses with or without certain
divisors. To find the variants, the checks run here on tensors without numbers, and what they would launch is compiled.
Triton keeps it on disk, where the process that runs the checks on the GPU finds it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch
from zlib import crc32

if TYPE_CHECKING:
    from accessory.model.args import ModelArgs

sys.path[0] = str(Path(__file__).resolve().parents[2])

WARP = 32  # threads
ANSWERS = (
    ("7B", "lora", 768, (1, 4, 8)), ("70B", "lora", 1280, (1, 4, 8)), ("7B", "normbias", 256, (1, 8)),
)  # fmt: skip
"""(size, method, tokens of the cache, documents) of models that the checks ask."""


class Compiler:
    """Compiles every `of`-th variant instead of launching it, from number `share` on.

    capability: the GPU's, 90 for 9.0. faults: what does not compile.
    """

    def __init__(self, capability: int, share: int, of: int) -> None:
        self.capability, self._share, self._of = capability, share, of
        self.variants: set[tuple[str, str]] = set()
        self.compiled = 0
        self.faults: list[str] = []

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Inside this context launches compile, and Triton believes in the GPU."""
        from triton import knobs
        from triton.runtime.driver import driver
        from triton.runtime.jit import JITFunction

        run = JITFunction.run

        def compile_it(kernel: JITFunction, *given: Any, **named: Any) -> None:
            """As `JITFunction.run`, without a launch."""
            given, named = map(_place, given), {name: _place(value) for name, value in named.items()}
            try:
                run(kernel, *given, **named | {"warmup": True})
            except Exception as error:  # whatever a compiler raises
                self.faults.append(f"{kernel.fn.__name__}: {type(error).__name__}: {str(error).strip()[:300]}")

        with ExitStack() as held:
            held.enter_context(patch.object(driver, "_active", self))
            held.enter_context(patch.object(knobs.runtime, "jit_cache_hook", self._leaves))
            held.enter_context(patch.object(knobs.compilation, "listener", self._count))
            held.enter_context(patch.object(JITFunction, "run", compile_it))
            yield

    def _leaves(self, *, key: str, fn: Any, **_rest: Any) -> bool:
        """Triton's hook before it compiles: whether it shall not, because another process does."""
        variant = fn.name, key
        self.variants.add(variant)
        return crc32(repr(variant).encode()) % self._of != self._share

    def _count(self, *, cache_hit: bool, **_rest: Any) -> None:
        """Triton's hook after it has compiled, or has found the result on disk."""
        self.compiled += not cache_hit

    def get_current_target(self) -> Any:
        """As Triton's driver: what is compiled for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, WARP)

    def get_current_device(self) -> int:
        """As Triton's driver."""
        return 0

    def get_current_stream(self, _device: int) -> int:
        """As Triton's driver."""
        return 0


class _Place:
    """What Triton's compiler is told of a tensor, whose memory begins at an aligned address."""

    def __init__(self, dtype: Any, offset: int) -> None:
        self.dtype, self._offset = dtype, offset

    def data_ptr(self) -> int:
        """Its address, but for a multiple of many bytes."""
        return self._offset


def _place(value: Any) -> Any:
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    return _Place(value.dtype, value.storage_offset() * value.element_size())


def compile_all(compiler: Compiler, tiny: bool) -> list[str]:
    """Run what launches kernels, on tensors without numbers; returns what could not be run."""
    import torch

    from accessory.kernels import bitsandbytes_library, trial
    from accessory.kernels.triton import DECODING, KERNELS
    from accessory.parallel.groups import Layout
    from tools.benchmarking.pretended_gpu import pretended
    from tools.gpu_checks import kernels as room
    from tools.gpu_checks.check import Ground

    ground, ended = Ground(Layout(device=torch.device("cuda", 0)), tiny), []

    def run(name: str, call: Callable[[], object]) -> None:
        """Note an error, and go on."""
        try:
            call()
        except Exception as error:
            ended.append(f"{name}: {type(error).__name__}: {str(error).strip()[:300]}")

    with ExitStack() as held:
        held.enter_context(compiler.instead())
        held.enter_context(pretended(triton=True))
        held.enter_context(patch.object(trial, "_disable_current_modes", nullcontext))
        held.enter_context(patch.object(bitsandbytes_library, "AVAILABLE", False))  # it reads numbers by their address
        held.enter_context(patch.object(room, "copy_rate", lambda _ground: 1.0))
        held.enter_context(patch.object(room, "replayed", lambda call, _ground: call))
        held.enter_context(patch.object(room, "seconds_of", lambda call, _ground: call() is None or 1.0))
        for dtype in room.DTYPES:
            for name in KERNELS + DECODING:
                run(
                    f"the trial of {name}",
                    lambda n=name, d=dtype: trial.wrong_kernels("triton", (n,), ground.device, d),
                )
        for check in room.CHECKS:
            run(check.name, lambda c=check: c.run(ground, _unjudged()))
        for name, given in {} if tiny else _answers():
            run(name, lambda g=given: _answer(*g))
    return ended


def _answers() -> Iterator[tuple[str, tuple]]:
    """(name, arguments of `_answer`) of the answers that the checks ask for."""
    from accessory.model.args import ModelArgs
    from tools.gpu_checks.decoding import CASES
    from tools.gpu_checks.families import SHAPES, SIZE
    from tools.model_sizes import args_of

    for size, method, context, counts in ANSWERS:
        args = args_of(size).model_copy(update={"n_layers": 2, "vocab_size": 32000})
        yield f"answers of {size}", (args, method, "nf4", "bf16", counts, (context,))
    for family, kind in CASES:
        yield f"answers of {family}", (ModelArgs(**SIZE | SHAPES[family]), "lora", kind, "fp32", (1, 2, 4), (256, 512))
    for kind in (None, "nf4", "int3_g64"):
        for precision in ("fp32", "bf16", "fp16"):
            yield f"answers in {precision}", (ModelArgs(**SIZE), "lora", kind, precision, (1,), (64,))


def _answer(
    args: ModelArgs, method: str, kind: str | None, precision: str, counts: tuple[int, ...], spans: tuple[int, ...]
) -> None:
    """A token of each of so many documents, of which so many tokens are looked at."""
    import torch

    from tools.benchmarking.counted_token import pretended_answering

    with torch.no_grad():
        memory = pretended_answering(args, method, kind, max(counts), max(spans), precision)
        for count in counts:
            for span in spans:
                memory.forward(count, span)


def _unjudged() -> Any:
    """Findings of numbers that there are not."""
    from tools.gpu_checks.check import Findings

    class Unjudged(Findings):
        """Compares nothing."""

        def expect(self, holds: object, words: str) -> None:
            """Nothing."""

        def close(self, *_given: object) -> float:
            """Nothing."""
            return 0.0

    return Unjudged()


def main(capability: int, of: int, tiny: bool, share: int) -> None:
    """Compile, and print a line of JSON: how many variants there are, how many were compiled here, what went wrong."""
    from tools.benchmarking import pretended_gpu

    pretended_gpu.load()
    from accessory.parallel import groups

    groups.start("cpu")
    compiler = Compiler(capability, share, of)
    faults = compile_all(compiler, tiny) + compiler.faults
    found = {"variants": len(compiler.variants), "compiled": compiler.compiled, "faults": faults}
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "tiny", int(sys.argv[4]))
