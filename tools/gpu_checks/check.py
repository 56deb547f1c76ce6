"""What a check is, where it runs, and what it finds."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from accessory.parallel.groups import Layout

T = TypeVar("T")
Function = Callable[["Ground", "Findings"], None]


class Skipped(Exception):
    """Raised by a check that cannot run here; the text says what is missing."""


@dataclass(frozen=True)
class Ground:
    """Where checks run. tiny: sizes are small enough for a CPU, where a check of CUDA is only rehearsed."""

    layout: Layout
    tiny: bool

    @property
    def device(self) -> torch.device:
        """The first GPU, or the CPU."""
        return self.layout.device

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    def pick(self, full: T, tiny: T) -> T:
        """A size for the card, or for the rehearsal."""
        return tiny if self.tiny else full


@dataclass
class Findings:
    """figures: what was measured, by name. faults: what is wrong, a line each; none: the check passes."""

    figures: dict[str, object] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def expect(self, holds: object, words: str) -> None:
        """Record the fault `words` unless `holds` is true."""
        if not holds:
            self.faults.append(words)

    def close(self, name: str, found: Tensor, wanted: Tensor, tolerance: float) -> float:
        """Compare by the norm of the difference, relative to that of `wanted`, in float64; returns it.

        The largest of a check becomes its figure `worst`. Tolerance 0: all bits are equal but a zero's sign.
        """
        found, wanted = (t.detach().to("cpu", torch.float64) for t in (found, wanted))
        if found.shape != wanted.shape:
            self.faults.append(f"{name}: has shape {tuple(found.shape)}, expected {tuple(wanted.shape)}")
            return float("inf")
        error = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30)) if found.numel() else 0.0
        if not error <= tolerance:  # written so that NaN is a fault, too
            self.faults.append(f"{name}: off by {error:.2e}, {tolerance:.0e} is allowed")
        worst = self.figures.get("worst", {"error": -1.0})
        if not error <= worst["error"]:
            self.figures["worst"] = {"error": float(f"{error:.3g}"), "of": name, "allowed": tolerance}
        return error

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """Record an error raised inside as a fault of `name` and go on, unless the error has lost the device."""
        try:
            yield
        except Skipped:
            raise
        except Exception as error:
            if is_device_lost(error):
                raise
            self.faults.append(f"{name}: {brief(error)}")


@dataclass(frozen=True)
class Check:
    """seconds: about what the check takes on an H200. needs_cuda: a run on the CPU is only a rehearsal. by_name: it
    takes long on the CPU, so it runs there only if its name is given. beside: it measures nothing and may run at the
    same time as its neighbours that say so, too.
    """

    name: str
    seconds: float
    needs_cuda: bool
    by_name: bool
    beside: bool
    function: Function

    def run(self, ground: Ground, findings: Findings) -> None:
        """Fill `findings`; raises `Skipped`, and whatever the checked code raises."""
        self.function(ground, findings)


def check(
    seconds: float, *, needs_cuda: bool = False, by_name: bool = False, beside: bool = False
) -> Callable[[Function], Check]:
    """Make a function a check, named after its room (its file) and itself: kernels.rms_norm."""

    def made(function: Function) -> Check:
        """The check."""
        room = function.__module__.rpartition(".")[2]
        return Check(f"{room}.{function.__name__}", seconds, needs_cuda, by_name, beside, function)

    return made


def is_device_lost(error: BaseException) -> bool:
    """Whether nothing more can run in this process: CUDA repeats an asynchronous error at every later call."""
    words = str(error)
    return "CUDA error" in words or "device-side assert" in words or "illegal memory access" in words


def brief(error: BaseException) -> str:
    """The error in a line or a few, with where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = "; ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in frames[-4:])
    return f"{type(error).__name__}: {str(error).strip()[:800]} ({where})"
