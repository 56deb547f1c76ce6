"""How much memory a stretch of a program allocates on the CPU at its worst, as PyTorch's allocator counts it."""

from __future__ import annotations

from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile


class AllocatedPeak:
    """Bytes of all tensors that were made while it was entered and were alive together, at most.

    Resident memory is no measure of a plan: it holds libraries, freed memory that was kept, and holes. The profiler's
    memory events tell every allocation; tensors made before count for nothing, unless they are freed meanwhile.
    """

    bytes: int

    def __enter__(self) -> AllocatedPeak:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._profile.__exit__(kind, error, trace)
        changes = [
            (event.start_ns(), event.nbytes())
            for event in self._profile.profiler.kineto_results.events()
            if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
        ]
        alive = self.bytes = 0
        for _, change in sorted(changes, key=lambda c: c[0]):
            alive += change
            self.bytes = max(self.bytes, alive)
