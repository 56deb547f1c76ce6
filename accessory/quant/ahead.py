"""Unpacking the next matrix beside the product before it: two buffers, and a second stream of a GPU.

Unpacking is bound by memory and products by arithmetic, so that a GPU may do both at once. Which matrix is next is what
came next the last time after the same ones: a step uses its matrices in an order that repeats. The numbers are the
same; where the guess was wrong, the matrix is unpacked as without this.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

_REMEMBERED = 8  # matrices before the next: more than a block's, so that its three passes are told apart


class Unpackable(Protocol):
    """What is asked of a `PackedWeight`."""

    shape: torch.Size
    codes: Tensor

    def unpack_into(self, out: Tensor) -> Tensor:
        """See `PackedWeight`."""

    def parameters(self) -> Iterator[Tensor]:
        """Its parts."""


class Lanes(Protocol):
    """Two orders of work on a device: the caller's, and one beside it."""

    def mark(self) -> Any:
        """Of what has been asked for in the caller's order up to here."""

    def beside(self, after: Any) -> AbstractContextManager[None]:
        """What is asked for inside is done in the other order, once `after`, a mark, has been reached."""

    def mark_beside(self) -> Any:
        """As `mark`, of the other order."""

    def wait(self, until: Any) -> None:
        """What the caller asks for from here on is done once `until`, a mark of the other order, has been reached."""

    def used_beside(self, tensor: Tensor) -> None:
        """The other order uses a tensor: once it is given up, its memory is not used again before that is over."""


class CudaLanes:
    """The current stream, and one of its own."""

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
    """A matrix that is being unpacked into the buffer `place`, as its parts are; it is there at the mark `ready`."""

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
        self._used: dict[int, tuple[object, ...]] = {}  # of what parts a matrix was when it was used last
        self._unpacked: _Unpacked | None = None
        self._place, self._mark, self._dtype = 0, None, torch.float32
        self.hits = self.misses = 0

    def unpack(self, matrix: Unpackable, dtype: torch.dtype) -> Tensor:
        """The matrix [N, K] in a buffer, for one product: it is overwritten after the next call."""
        self._mark = self._lanes.mark()  # all that reads the other buffer was asked for before
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
        if found is not None:  # a wrong guess, whose buffer may be the next that is written in the caller's order
            self._lanes.wait(found.ready)
        return matrix.unpack_into(self._buffer(self._place, matrix, dtype))

    def look_ahead(self) -> None:
        """After the product: unpack what is likely to come next, beside it."""
        following = self._next.get(tuple(map(id, self._before)))
        if following is None or self._mark is None or self._unpacked is not None:
            return
        if _parts(following) != self._used[id(following)]:  # a sharded one is not whole until it is used
            return
        place, held = 1 - self._place, self._buffers[1 - self._place]
        buffer = self._buffer(place, following, self._dtype)
        if self._buffers[place] is not held:  # new memory, whose last user may have been asked for since
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
    """Which tensors they are, and how often they have been changed."""
    return tuple((id(part), 0 if part.is_inference() else part._version) for part in matrix.parameters())


_active: Ahead | None = None


def active() -> Ahead | None:
    """What unpacks ahead in this process, if anything does."""
    return _active


@contextmanager
def unpacking_ahead(ahead: Ahead | None) -> Iterator[None]:
    """Inside this context matrices are unpacked by `ahead`; None: as they are without."""
    global _active
    before, _active = _active, ahead
    try:
        yield
    finally:
        _active = before
