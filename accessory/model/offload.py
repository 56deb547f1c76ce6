"""The inputs of recomputed blocks, kept in host memory between forward and backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor


class InputOffload(torch.autograd.graph.saved_tensors_hooks):
    """While it is entered, what autograd saves is moved off `device` and brought back when the backward asks for it.

    Entered around `torch.utils.checkpoint.checkpoint`, that is the block's input: what the block saves inside is under
    the hooks of the checkpoint. Copies run on a stream of their own, beside the computation: out while the next block
    runs forward, and in while the block behind it is run again, since whoever asks for an input has the one before it
    fetched too. The newest stays where it is, as it is wanted first; so up to three are on the device at a time.

    One serves all blocks. Inputs are linked in the order they were saved in, each knowing only the one before it while
    that lives: any number of forwards may be waiting, in any order, and a backward may be run twice. On the CPU,
    where nothing is gained, copies are plain; the tests use that. A saved input must not be changed in place.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(self._keep, _Kept.wanted)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._newest: Callable[[], _Kept | None] = _nobody

    def _keep(self, x: Tensor) -> Tensor | _Kept:
        if not x.numel():  # not an input: some releases of PyTorch hang their checkpoint on an empty tensor
            return _Kept(x, _nobody, None)
        before = self._newest()
        if before is not None:
            before.send()
        kept = _Kept(x.detach(), self._newest, self.stream)
        self._newest = weakref.ref(kept)
        return kept


def _nobody() -> None:
    """A reference to nothing."""


class _Kept:
    """One input: on the device (`here`), in host memory (`away`), or in both."""

    def __init__(self, x: Tensor, before: Callable[[], _Kept | None], stream: torch.cuda.Stream | None) -> None:
        self.here, self.away, self.before = x, None, before
        self.device, self.stream, self.arrived = x.device, stream, None

    def send(self) -> None:
        """Begin to copy it to the host, and let go of it here."""
        if self.away is None:
            self.away = _copied(self.here, "cpu", self.stream)
            self.here = None

    def fetch(self) -> None:
        """Begin to bring it back."""
        if self.here is None:
            self.here = _copied(self.away, self.device, self.stream)
            self.arrived = None if self.stream is None else self.stream.record_event()

    def wanted(self) -> Tensor:
        """The input, on its device; the one before it is on its way from now on."""
        self.fetch()
        x = self.here
        if self.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)
            x.record_stream(torch.cuda.current_stream(self.device))
        if self.away is not None:  # who asks again has it fetched again
            self.here = None
        before = self.before()
        if before is not None:
            before.fetch()
        return x


def _copied(x: Tensor, device: torch.device | str, stream: torch.cuda.Stream | None) -> Tensor:
    """A copy of `x` on `device`, made on `stream`."""
    if stream is None:
        return x.clone()
    if x.is_cuda:  # it may still be in the making
        stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        copy = torch.empty_like(x, device=device, pin_memory=torch.device(device).type == "cpu")
        copy.copy_(x, non_blocking=True)
        if x.is_cuda:
            x.record_stream(stream)  # its memory is not to be used again before the copy is made
    return copy
