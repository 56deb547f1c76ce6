"""What goes to a GPU goes there from page-locked memory, without waiting; elsewhere nothing is pinned."""

from __future__ import annotations

import pytest
import torch

from accessory.kernels.sending import send


def test_to_a_gpu_it_goes_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Pinned:
        """A copy in page-locked memory, which notes where it is sent."""

        def to(self, *where: torch.device, **how: bool) -> str:
            calls.append((where, how))
            return "there"

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda _tensor: Pinned())
    assert send(torch.zeros(3), torch.device("cuda", 1)) == "there"
    assert calls == [((torch.device("cuda", 1),), {"non_blocking": True})]
    here = torch.zeros(3)
    assert send(here, torch.device("cpu")) is here and send(here, torch.device("meta")).is_meta
    assert len(calls) == 1
