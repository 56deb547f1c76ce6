"""Matrices fitted to grids with whole zero points, for GPTQ's and AWQ's files."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from accessory.checkpoint.opening import open_source
from accessory.export import Destination, open_whole
from tests.checkpoint.formats.low_bit_models import OURS, converted


@pytest.mark.parametrize("to", ["gptq", "awq"])
def test_zeros_of_any_value_are_fitted_to_whole_points(written, tmp_path: Path, capfd, to: str) -> None:
    """In four bits and groups of one size, which transformers wants; the tool says how far the weights are off."""
    made = written("greenbit-plain")
    back = converted(made.path, tmp_path / to, to)
    said = re.search(
        r"zeros of 14 matrices .* by (\d+\.\d)% \(root mean square\), by (\d+\.\d)% in (\S+)", capfd.readouterr().out
    )
    stated = json.loads((back / "config.json").read_text())["quantization_config"]
    assert (stated["bits"], stated["group_size"]) == (4, 64) and "dynamic" not in stated
    tensors = open_source(back).tensors
    found = {f"model.layers.{i}.{theirs}": tensors[f"layers.{i}.{ours}.weight"].read()
             for theirs, ours in OURS.items() for i in range(2)}  # fmt: skip
    wanted = {key: torch.from_numpy(linear.dequantized()) for key, linear in made.linears.items()}
    off = {key: (found[key] - weight).norm().item() for key, weight in wanted.items()}
    size = {key: weight.norm().item() for key, weight in wanted.items()}
    share = {key: 100 * off[key] / size[key] for key in off}
    assert float(said[1]) == pytest.approx(100 * math.hypot(*off.values()) / math.hypot(*size.values()), abs=0.06)
    assert max(share, key=share.get) == said[3].removesuffix(".weight.")
    assert float(said[2]) == pytest.approx(max(share.values()), abs=0.06) and max(share.values()) < 15


@pytest.mark.parametrize(("to", "quant_type"), [("gptq", "int3_g64"), ("awq", "int4_g128")])
def test_full_weights_are_fitted_to_whole_points_at_once(
    tiny_base: Path, tmp_path: Path, capfd, to, quant_type
) -> None:
    """Not to a grid with free zeros first: nothing is converted, and little is lost beside such a grid."""
    model, _, _ = open_whole([tiny_base])
    Destination(to, "fp32", quant_type=quant_type).write(model, tmp_path / to)
    Destination("accessory", "fp32", quant_type=quant_type).write(model, tmp_path / "free")
    assert "no whole multiples" not in capfd.readouterr().out
    tensors = {name: open_source(tmp_path / name).tensors for name in (to, "free")}
    name = "layers.1.feed_forward.w2.weight"
    assert (tensors[to][name].storage.bits, tensors[to][name].storage.group) == (
        int(quant_type[3]),
        int(quant_type[5:].strip("_g")),
    )
    full = model.tensors[name].read()
    errors = [(tensors[which][name].read() - full).square().mean() for which in (to, "free")]
    assert errors[1] < errors[0] < 1.3 * errors[1]
