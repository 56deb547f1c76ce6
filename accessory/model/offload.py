"""The inputs of recomputed blocks, kept in host memory between forward and backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor


class InputOffload(torch.autograd.graph.saved_tensors_hooks):
    """Inside this context, what autograd saves is moved from `device` to host memory, and back when the backward asks.

    Around `torch.utils.checkpoint.checkpoint` that is the block's input; what the block saves inside is handled by the
    checkpoint. Copies run on their own stream beside the computation: to the host during the next block's forward, and
    back during the recomputation of the next block, because fetching an input also begins to fetch the one before it.
    The newest input stays on the device, as it is needed first; so up to three are there at a time.

    One instance serves all blocks. Inputs are linked in the order they were saved, each with a weak reference to the
    one before it: any number of forwards may be pending, in any order, and a backward may run twice. On the CPU, where
    nothing is gained, copies are plain; the tests use that. A saved input must not be changed in place.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(self._keep, _Kept.wanted)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._newest: Callable[[], _Kept | None] = lambda: None

    def _keep(self, x: Tensor) -> Tensor | _Kept:
        if not x.numel():  # not an input: some releases of PyTorch save an empty tensor for their checkpoint
            return _Kept(x, lambda: None, None)
        before = self._newest()
        if before is not None:
            before.send()
        kept = _Kept(x.detach(), self._newest, self.stream)
        self._newest = weakref.ref(kept)
        return kept


class _Kept:
    """One input: on the device (`here`), in host memory (`away`), or in both."""

    def __init__(self, x: Tensor, before: Callable[[], _Kept | None], stream: torch.cuda.Stream | None) -> None:
        self.here, self.away, self.before = x, None, before
        self.device, self.stream, self.arrived = x.device, stream, None

    def send(self) -> None:
        """Begin to copy it to the host, and release it on the device."""
        if self.away is None:
            self.away = _copied(self.here, "cpu", self.stream)
            self.here = None

    def fetch(self) -> None:
        """Begin to copy it back."""
        if self.here is None:
            self.here = _copied(self.away, self.device, self.stream)
            self.arrived = None if self.stream is None else self.stream.record_event()

    def wanted(self) -> Tensor:
        """The input, on its device; also begins to fetch the one before it."""
        self.fetch()
        x = self.here
        if self.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)
            x.record_stream(torch.cuda.current_stream(self.device))
        if self.away is not None:  # a second backward fetches it again
            self.here = None
        before = self.before()
        if before is not None:
            before.fetch()
        return x


def _copied(x: Tensor, device: torch.device | str, stream: torch.cuda.Stream | None) -> Tensor:
    """A copy of `x` on `device`, made on `stream`."""
    if stream is None:
        return x.clone()
    if x.is_cuda:  # its computation may not have ended
        stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        copy = torch.empty_like(x, device=device, pin_memory=torch.device(device).type == "cpu")
        copy.copy_(x, non_blocking=True)
        if x.is_cuda:
            x.record_stream(stream)  # its memory must not be reused before the copy is done
    return copy
