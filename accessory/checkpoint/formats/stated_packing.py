"""Compares what a quantization_config says of packed linears with what their tensors say.

We read a matrix by its tensors alone. Other programs trust the config, and would compute something else where it is
wrong; so a config that contradicts its tensors is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from accessory.errors import CheckpointError

_NAMES = {"bits": ("bits", "w_bit"), "group_size": ("group_size", "q_group_size")}
"""Key -> its names; the later ones are AutoAWQ's."""
_SYMMETRIC = {"sym": True, "zero_point": False}
"""Key -> the value that says that every zero point is in the middle of the range."""

_SPECIAL = frozenset("*+?^$()[]{}|\\")
"""Characters that only a pattern in AutoRound's `extra_config` has; a plain name has none of them."""


class Stated:
    """A quantization_config, `config`, and the file that it stands in.

    gptqmodel's `dynamic` and AutoRound's `extra_config` hold exceptions for some linears. Raises `CheckpointError` for
    exceptions that cannot be read.
    """

    def __init__(self, config: dict[str, Any], file: Path) -> None:
        self.config, self.file = config, file
        dynamic, self._named = (self._exceptions(key) for key in ("dynamic", "extra_config"))
        self._from_start = [(self._pattern(re.sub("^[+-]:", "", name)), {} if name[:2] == "-:" else config | other)
                            for name, other in dynamic.items()]  # fmt: skip
        self._anywhere = [(self._pattern(name), config | other)
                          for name, other in self._named.items() if not _SPECIAL.isdisjoint(name)]  # fmt: skip
        self._of: dict[str, dict[str, Any]] = {}

    def of(self, linear: str) -> dict[str, Any]:
        """What the config says of one linear; empty for one that it calls plain."""
        if linear not in self._of:
            self._of[linear] = self._found(linear)
        return self._of[linear]

    def _found(self, linear: str) -> dict[str, Any]:
        said = next((said for pattern, said in self._from_start if pattern.match(linear)), None)
        if said is None and linear in self._named:
            said = self.config | self._named[linear]
        if said is None:
            said = next((said for pattern, said in self._anywhere if pattern.search(linear)), None)
        return self.config if said is None else said

    def number(self, linear: str, key: str) -> Any:
        """The `bits` or `group_size` of a linear; None where the config does not say."""
        said = self.of(linear)
        return next((said[name] for name in _NAMES[key] if said.get(name) is not None), None)

    def check(self, linear: str, bits: int, group: int, columns: int, *, ordered: bool = False) -> None:
        """Compare with a linear whose tensors have numbers of `bits` bits, in groups of `group` of its `columns`.

        ordered: whether its groups take the channels in an order of their own. Raises `CheckpointError`.
        """
        said = self.number(linear, "bits")
        if said is not None and said != bits:
            raise self._error(linear, "bits", said, f"numbers of {bits} bits", bits)
        said = self.number(linear, "group_size")
        if said is not None and _channels(said, columns) != group:
            raise self._error(linear, "group_size", said, f"groups of {group} of {columns} channels", group)
        if ordered and self.of(linear).get("desc_act") is False:
            raise self._error(linear, "desc_act", False, "a g_idx that is not in order", True)

    def check_points(self, linear: str, points: Tensor, bits: int) -> None:
        """Compare with all zero points of a linear, whole numbers. Raises `CheckpointError`."""
        said, middle = self.of(linear), 1 << bits - 1
        key = next((key for key, value in _SYMMETRIC.items() if said.get(key) is value), None)
        if key is not None and not (points == middle).all():
            found = f"zero points from {points.min()} to {points.max()}, which would all be {middle}"
            raise self._error(linear, key, said[key], found, not said[key])

    def _error(self, linear: str, key: str, said: object, found: str, expected: object) -> CheckpointError:
        return CheckpointError(
            f"{self.file}: its quantization_config says {key} {said!r} of {linear}, whose tensors have {found}. "
            f"Expected {key} {expected!r}, or the tensors that belong to it."
        )

    def _exceptions(self, key: str) -> dict[str, dict[str, Any]]:
        found = self.config.get(key) or {}
        if not (isinstance(found, dict) and all(isinstance(other, dict) for other in found.values())):
            raise CheckpointError(f"{self.file}: its {key} is {str(found)[:80]}; expected an object of objects.")
        return found

    def _pattern(self, pattern: str) -> re.Pattern:
        try:
            return re.compile(pattern)
        except re.error as error:
            raise CheckpointError(
                f"{self.file}: {pattern!r} in its quantization_config is no pattern of linears' names ({error})."
            ) from error


def _channels(size: object, columns: int) -> object:
    """Channels of a full group, for the `group_size` of a config, where -1 means a whole row."""
    return (min(size, columns) if size > 0 else columns if size == -1 else size) if isinstance(size, int) else size
