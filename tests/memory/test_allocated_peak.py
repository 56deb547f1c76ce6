"""The meter of allocated memory."""

from __future__ import annotations

import torch

from tests.memory.allocated_peak import AllocatedPeak


def test_peak_is_what_is_alive_together() -> None:
    """Two tensors at once, then one of them: not the sum of all that was made."""
    with AllocatedPeak() as peak:
        one, other = torch.empty(1 << 20), torch.empty(1 << 18)
        del one
        torch.empty(1 << 19)
        del other
    assert peak.bytes == 4 * ((1 << 20) + (1 << 18))


def test_made_before_counts_for_nothing() -> None:
    """Only what is added."""
    before = torch.ones(1 << 20)
    with AllocatedPeak() as peak:
        before.add_(1)
        torch.empty(1 << 10)
    assert peak.bytes == 4 << 10
