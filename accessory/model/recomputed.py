"""A tensor that can be made again from what is kept anyway, so that nobody needs to keep it too."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import NamedTuple

from torch import Tensor


class Recomputed(NamedTuple):
    """`value`, and how its reader makes it again in the backward: `make(*inputs)`, elementwise work on kept tensors.

    A norm's output or an activation's, which a linear with LoRA would otherwise keep beside their inputs. Gradients
    reach `inputs` through `value` alone.
    """

    value: Tensor
    inputs: tuple[Tensor, ...]
    make: Callable[..., Tensor]

    @staticmethod
    def of(value: Tensor | Recomputed) -> Recomputed:
        """A tensor as it is: kept by whoever reads it."""
        return value if isinstance(value, Recomputed) else Recomputed(value, (value,), lambda kept: kept)


_RUNS_AGAIN = ContextVar("runs_again", default=False)


class RunningAgain:
    """While it is entered, a block runs forward for what its backward needs to keep: nobody reads its result.

    It may be entered several times, but not within itself.
    """

    def __enter__(self) -> None:
        self._token = _RUNS_AGAIN.set(True)

    def __exit__(self, *_exception: object) -> None:
        _RUNS_AGAIN.reset(self._token)


def runs_again() -> bool:
    """Whether a block does so now."""
    return _RUNS_AGAIN.get()
