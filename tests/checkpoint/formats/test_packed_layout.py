"""Packed matrices written in the layouts of GPTQ, AWQ and GreenBit: no bit of them changes, or it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from accessory.checkpoint.lazy import PackedTensor
from accessory.checkpoint.opening import open_source
from accessory.errors import CheckpointError
from tests.checkpoint.formats.low_bit_models import WRITERS, converted, logits


@pytest.mark.parametrize("name", WRITERS)
def test_round_trip_by_way_of_ours(written, tmp_path: Path, name: str) -> None:
    """Relabelled as ours, and back into the layout it came in, no bit of a matrix changes."""
    made = written(name)
    own = converted(made.path, tmp_path / "own", "accessory")
    assert torch.equal(logits(own), logits(made.path))
    to = {"gptq": "gptq", "awq": "awq"}.get(name.split("-")[0].split("_")[0], "greenbit")
    back = converted(own, tmp_path / "back", to)
    assert torch.equal(logits(back), logits(made.path))
    before, after = (load_file(path / "model.safetensors") for path in (made.path, back))
    if to == "gptq" and name != "gptq-4-sym":  # where gptqmodel takes other zero points from others than itself
        assert json.loads((back / "config.json").read_text())["quantization_config"]["checkpoint_format"] == "gptq_v2"
    if name in ("gptq-4", "gptq-4-zero-points", "gptq-4-act", "gptq-3-act", "gptq-2"):
        points = [{key: tensor.read_packed()["points"] for key, tensor in open_source(path).tensors.items()
                   if isinstance(tensor, PackedTensor)} for path in (made.path, back)]  # fmt: skip
        assert len(points[0]) == 14 and all(torch.equal(value, points[1][key]) for key, value in points[0].items())
        before, after = ({k: v for k, v in found.items() if not k.endswith(".qzeros")} for found in (before, after))
    if name in ("greenbit-two-levels", "greenbit-channel-mix"):  # no layout that we write
        return
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
    if to == "greenbit":
        strategies = [json.loads((path / "quant_strategy.json").read_text()) for path in (made.path, back)]
        said = [{b: {n: (e["bits"], e["group_size"][str(e["bits"][0])]) for n, e in block.items()}
                 for b, block in strategy["measurement"].items()} for strategy in strategies]  # fmt: skip
        assert said[0] == said[1]


def test_what_a_layout_cannot_hold_is_refused(written, tiny_base: Path, tmp_path: Path) -> None:
    """By name, with what to do instead."""
    for source, to, message in (
        (written("greenbit").path, "gptq", "has a scale for each input channel, which GPTQ's files have no place for"),
        (written("greenbit").path, "awq", "has a scale for each input channel, which AWQ's files have no place for"),
        (written("gptq-4-act").path, "awq", "has its channels in another order .* write it --to gptq"),
        (written("gptq_v2-3").path, "greenbit", "has numbers of 3 bits; GreenBit's files hold 2 and 4"),
        (written("gptq-4").path, "hf", "int4_g64 matrices have no place .*--to accessory, gptq, awq or greenbit"),
        (tiny_base, "gptq", "--to gptq holds whole numbers in groups; nothing is packed"),
    ):
        with pytest.raises(CheckpointError, match=message):
            converted(source, tmp_path / "refused", to)
        assert not (tmp_path / "refused").exists()
