"""A tensor that can be made again from what is kept anyway, so that nobody needs to keep it too."""

from __future__ import annotations

from collections.abc import Callable
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
