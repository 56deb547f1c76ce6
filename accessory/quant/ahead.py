"""Unpacks the next matrix while the product before it runs, in two buffers and on a second stream of a GPU.

Unpacking is bound by memory and products by arithmetic, so a GPU may do both at once. A step uses its matrices in an
order that repeats, so the next matrix is guessed: the one that followed the same matrices last time. After a wrong
guess, the right matrix is unpacked in the usual way; results are the same either way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

_REMEMBERED = 8  # matrices that a guess looks at: more than a block has, to tell apart its three passes


class Unpackable(Protocol):
    """The part of `PackedWeight` that is used here."""

    shape: torch.Size
    codes: Tensor

    def unpack_into(self, out: Tensor) -> Tensor:
        """See `PackedWeight`."""

    def parameters(self) -> Iterator[Tensor]:
        """The tensors that it is made of."""


class Lanes(Protocol):
    """Two queues of work on a device: the caller's, and one beside it."""

    def mark(self) -> Any:
        """A mark in the caller's queue: it is reached once all work queued so far is done."""

    def beside(self, after: Any) -> AbstractContextManager[None]:
        """Inside this context work goes to the other queue, and starts once the mark `after` is reached."""

    def mark_beside(self) -> Any:
        """As `mark`, in the other queue."""

    def wait(self, until: Any) -> None:
        """The caller's later work starts once `until`, a mark of the other queue, is reached."""

    def used_beside(self, tensor: Tensor) -> None:
        """Say that the other queue uses `tensor`: its memory, once freed, is reused only after that queue's work."""


class CudaLanes:
    """The current CUDA stream, and a second one."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._side = device, torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event:
        """See `Lanes`."""
        return torch.cuda.current_stream(self._device).record_event()

    @contextmanager
    def beside(self, after: torch.cuda.Event) -> Iterator[None]:
        """See `Lanes`."""
        self._side.wait_event(after)
        with torch.cuda.stream(self._side):
            yield

    def mark_beside(self) -> torch.cuda.Event:
        """See `Lanes`."""
        return self._side.record_event()

    def wait(self, until: torch.cuda.Event) -> None:
        """See `Lanes`."""
        torch.cuda.current_stream(self._device).wait_event(until)

    def used_beside(self, tensor: Tensor) -> None:
        """See `Lanes`."""
        tensor.record_stream(self._side)


class _Unpacked(NamedTuple):
    """A matrix that is being unpacked into buffer `place`, from `parts`; it is complete at the mark `ready`."""

    matrix: Unpackable
    dtype: torch.dtype
    parts: tuple[object, ...]
    place: int
    ready: Any


class Ahead:
    """Unpacks matrices into two buffers in turn, and the next one before it is asked for."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._buffers: list[Tensor | None] = [None, None]
        self._before: deque[Unpackable] = deque(maxlen=_REMEMBERED)
        self._next: dict[tuple[int, ...], Unpackable] = {}
        self._used: dict[int, tuple[object, ...]] = {}  # a matrix's id -> its parts at its last use
        self._unpacked: _Unpacked | None = None
        self._place, self._mark, self._dtype = 0, None, torch.float32
        self.hits = self.misses = 0

    def unpack(self, matrix: Unpackable, dtype: torch.dtype) -> Tensor:
        """The matrix [N, K] in a buffer, for one product; the buffer is overwritten after the next call."""
        self._mark = self._lanes.mark()  # everything that reads the other buffer is queued before this
        found, self._unpacked = self._unpacked, None
        self._next[tuple(map(id, self._before))] = matrix
        self._before.append(matrix)
        self._dtype, parts = dtype, _parts(matrix)
        self._used[id(matrix)] = parts
        if found is not None and (found.matrix is matrix, found.dtype, found.parts) == (True, dtype, parts):
            self.hits += 1
            self._place = found.place
            self._lanes.wait(found.ready)
            return self._buffer(found.place, matrix, dtype)
        self.misses += 1
        self._place = 1 - (self._place if found is None else found.place)
        if found is not None:  # a wrong guess: the caller's queue may write its buffer next
            self._lanes.wait(found.ready)
        return matrix.unpack_into(self._buffer(self._place, matrix, dtype))

    def look_ahead(self) -> None:
        """Call it after queueing a product: unpacks the likely next matrix while the product runs."""
        following = self._next.get(tuple(map(id, self._before)))
        if following is None or self._mark is None or self._unpacked is not None:
            return
        if _parts(following) != self._used[id(following)]:  # changed, or sharded and not whole yet
            return
        place, held = 1 - self._place, self._buffers[1 - self._place]
        buffer = self._buffer(place, following, self._dtype)
        if self._buffers[place] is not held:  # new memory: its last user may be queued after the mark
            self._mark = self._lanes.mark()
        with self._lanes.beside(self._mark):
            following.unpack_into(buffer)
            ready = self._lanes.mark_beside()
        self._unpacked = _Unpacked(following, self._dtype, _parts(following), place, ready)

    def _buffer(self, place: int, matrix: Unpackable, dtype: torch.dtype) -> Tensor:
        held, size = self._buffers[place], matrix.shape.numel() * dtype.itemsize
        if held is None or held.numel() < size:
            with torch.inference_mode(False):  # training may not write into tensors of inference mode
                held = self._buffers[place] = torch.empty(size, dtype=torch.uint8, device=matrix.codes.device)
            self._lanes.used_beside(held)
        return held[:size].view(dtype).view(matrix.shape)


def _parts(matrix: Unpackable) -> tuple[object, ...]:
    """A matrix's tensors, and how often each has been changed."""
    return tuple((id(part), 0 if part.is_inference() else part._version) for part in matrix.parameters())


_active: Ahead | None = None


def active() -> Ahead | None:
    """The `Ahead` of this process, if there is one."""
    return _active


@contextmanager
def unpacking_ahead(ahead: Ahead | None) -> Iterator[None]:
    """Inside this context `ahead` unpacks matrices; None: each is unpacked when it is used."""
    global _active
    before, _active = _active, ahead
    try:
        yield
    finally:
        _active = before
