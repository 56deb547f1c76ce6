"""A tensor that can be recomputed from tensors that are saved anyway, and so need not be saved itself."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import NamedTuple

from torch import Tensor


class Recomputable(NamedTuple):
    """`value`, and how to recompute it in the backward: `make(*inputs)`, elementwise work on saved tensors.

    For outputs of norms and activations, which a linear with LoRA would otherwise save beside their inputs. Gradients
    reach `inputs` through `value` alone. chosen: whether `inputs` hold the tokens of `backward_rows` only.
    """

    value: Tensor
    inputs: tuple[Tensor, ...]
    make: Callable[..., Tensor]
    chosen: bool = False

    @staticmethod
    def of(value: Tensor | Recomputable) -> Recomputable:
        """A plain tensor, which its reader saves itself; a `Recomputable` as it is."""
        return value if isinstance(value, Recomputable) else Recomputable(value, (value,), lambda kept: kept)


_RECOMPUTING = ContextVar("recomputing", default=False)


class Recomputation:
    """Inside this context a block is recomputed for its backward. It may be entered several times, but not nested."""

    def __enter__(self) -> None:
        self._token = _RECOMPUTING.set(True)

    def __exit__(self, *_exception: object) -> None:
        _RECOMPUTING.reset(self._token)


def recomputing() -> bool:
    """Whether a block is being recomputed, so that nobody reads its result."""
    return _RECOMPUTING.get()
