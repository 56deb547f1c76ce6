"""Writing GPTQ's files: linears that are packed otherwise than most."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoint.formats.low_bit_models import changed, converted, logits


def test_mixed_widths_go_into_gptq_with_exceptions(written, tmp_path: Path) -> None:
    """gptqmodel's `dynamic` says which linears are packed otherwise, or not."""

    def mix(stored: dict[str, Tensor]) -> None:
        """v in 4 bits, up plain, others in 2."""
        wide = load_file(written("gptq-4").path / "model.safetensors")
        stored |= {key: value for key, value in wide.items() if "v_proj" in key}
        for key in [key for key in stored if "up_proj" in key]:
            del stored[key]
        stored |= {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(256, 128) for i in range(2)}

    said = {"-:.*up_proj": {}, "+:.*v_proj": {"bits": 4}}
    source = changed(written("gptq-2"), tmp_path / "mixed", mix, dynamic=said)
    back = converted(source, tmp_path / "back", "gptq")
    stated = json.loads((back / "config.json").read_text())["quantization_config"]
    assert (stated["bits"], stated["group_size"]) == (2, 64)
    assert stated["dynamic"] == {
        f"{sign}:model\\.layers\\.{i}\\.{name}": said
        for i in range(2)
        for sign, name, said in (("-", "mlp\\.up_proj", {}), ("+", "self_attn\\.v_proj", {"bits": 4, "group_size": 64}))
    }
    assert torch.equal(logits(back), logits(source))
