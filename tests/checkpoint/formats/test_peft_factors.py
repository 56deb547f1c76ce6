"""Factors that are padded, scaled, cut out of others, or new."""

from __future__ import annotations

from pathlib import Path

import torch

from accessory.checkpoint.formats.peft_adapter import open_adapter
from accessory.checkpoint.opening import open_source
from tests.checkpoint.formats.peft_models import LORA_AND_NORMS, exported, made_by_peft, trained_here


def test_a_range_is_cut_out_of_the_whole(base_of, tmp_path: Path) -> None:
    """As ranks that share the matrices read them: of factors that are padded, scaled, stacked in one, or absent."""
    base = open_source(base_of("bloom"))
    padded, _ = made_by_peft(
        base.path,
        tmp_path / "padded",
        rank_pattern={"query_key_value": 2, "0.mlp.*": 3},
        target_modules=r".*(query_key_value|0\.mlp.*h)",
    )
    blocks = exported(base.path, tmp_path / "blocks", trained_here(base.path, tmp_path / "delta", **LORA_AND_NORMS))
    for adapter in (padded, blocks):
        for name, tensor in open_adapter(adapter, base).tensors.items():
            whole = tensor.read()
            assert tensor.shape == whole.shape, name
            for dim, size in enumerate(whole.shape):
                for start, stop in ((0, size), (1, 2), (size // 2, size)):
                    found = tensor.read(dim, start, stop)
                    assert torch.equal(found, whole.narrow(dim, start, stop - start)), (name, dim, start)
