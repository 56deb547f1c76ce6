"""Work that is recorded once and then replayed, as a CUDA graph where there is a GPU."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accessory.quant.workspace import memory_in_use

_LOG = logging.getLogger(__name__)


class Recorded(NamedTuple):
    """Recorded work. replay: does it again, in the same memory. result: what it fills. alive: memory to keep for it."""

    replay: Callable[[], None]
    result: Tensor
    alive: Any = None


Recorder = Callable[[Callable[[], Tensor]], Recorded]
"""Calls a function and records its work instead of doing it."""


class Replays:
    """Runs work by its key: the first use does it, the second records it, and later ones replay it.

    The first use compiles kernels and makes buffers, which cannot be recorded. recorder: None: nothing is recorded.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self._recorder = recorder
        self._done: set[Hashable] = set()
        self._recorded: dict[Hashable, Recorded] = {}

    def run(self, key: Hashable, work: Callable[[], Tensor]) -> Tensor:
        """The result of `work`, valid until the next call. A key must always come with the same work."""
        if key not in self._recorded:
            if key not in self._done or self._recorder is None:
                self._done.add(key)
                return work()
            try:
                self._recorded[key] = self._recorder(work)
            except Exception as error:  # drivers and libraries raise errors of any type
                _LOG.warning(
                    "A token's kernels cannot be recorded as a CUDA graph and are launched one by one: %s: %s",
                    type(error).__name__,
                    str(error).strip().partition("\n")[0],
                )
                self._recorder = None
                return work()
        recorded = self._recorded[key]
        recorded.replay()
        return recorded.result

    def forget(self) -> None:
        """Drop what was recorded, because weights or caches lie elsewhere now."""
        self._done.clear()
        self._recorded.clear()


def recorder_for(device: torch.device, ranks: int) -> Recorder | None:
    """A GPU's recorder; None if the work includes collectives of model-parallel ranks: one rank alone could fail."""
    return CudaGraphs(device) if device.type == "cuda" and ranks == 1 else None


class CudaGraphs:
    """Records into one pool of memory: only one of the graphs is replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: Callable[[], torch.cuda.CUDAGraph | None] = lambda: None

    def __call__(self, work: Callable[[], Tensor]) -> Recorded:
        """See `Recorder`. Raises what CUDA raises where something cannot be recorded."""
        before, last = torch.cuda.memory_reserved(self._device), self._last()
        pool = None if last is None else last.pool()  # a pool is freed with the last of its graphs
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # thread_local: other threads of this process may use the GPU meanwhile.
            with torch.cuda.device(self._device), torch.cuda.graph(
                graph, pool=pool, capture_error_mode="thread_local"
            ):  # fmt: skip
                result = work()
        except Exception:  # whatever ended the recording: the stream is set back, and the error goes on
            _leave_recording(stream)
            raise
        self._last = weakref.ref(graph)
        taken = max(torch.cuda.memory_reserved(self._device) - before, 0)
        _LOG.info("A CUDA graph of a token for %d documents was recorded; it takes %.1f MB.", len(result), taken / 1e6)
        return Recorded(graph.replay, result, memory_in_use())


def _leave_recording(stream: torch.cuda.Stream) -> None:
    """Return to `stream`: after a failure PyTorch stays in the recording's stream, and its generator in that mode."""
    torch.cuda.set_stream(stream)
    generator = torch.cuda.default_generators[stream.device_index]
    generator.graphsafe_set_state(generator.clone_state())
