"""Numbers that are read later are those of the moment they were asked for."""

from __future__ import annotations

import torch

from accessory.parallel.later import Later


def test_what_changes_afterwards_is_not_read() -> None:
    values = torch.tensor([1.5, 2.0], dtype=torch.float64)
    later = Later(values)
    values.zero_()
    assert later.read() == [1.5, 2.0]
