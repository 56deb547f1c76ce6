"""What is packed comes back, and nothing else can be packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accessory.data.templates import DIALOG, DialogPrompt, question_prompt
from accessory.errors import ConfigError
from accessory.multi_gpu.messages import pack, unpack


def test_values_come_back() -> None:
    """Tensors of any type and none, prompts, bytes, and texts that look like the keys which stand for them."""
    dialog = question_prompt("é?", "", DIALOG)
    assert isinstance(dialog, DialogPrompt)
    tensors = [torch.arange(6).view(2, 3).t(), torch.randn(3).bfloat16(), torch.zeros(0)]
    found = unpack(pack([tensors, {"a": dialog, "b": [None, True, 2, 0.5, "//tensor", b"\x00\xff"]}]))
    for one, other in zip(found[0], tensors, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    assert found[1] == {"a": dialog, "b": [None, True, 2, 0.5, "//tensor", b"\x00\xff"]}
    assert unpack(pack((Path("a/b"), torch.bfloat16, torch.device("cpu")))) == ["a/b", "torch.bfloat16", "cpu"]


@pytest.mark.parametrize("value", [object(), {1, 2}, [print], bytearray(b"bytes")])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="cannot be handed to the processes of a MultiGpuWrapper; expected texts"):
        pack(value)
