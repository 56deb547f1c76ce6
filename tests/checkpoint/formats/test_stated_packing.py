"""A quantization_config that contradicts the tensors beside it, and words for single linears."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from accessory.checkpoint.formats.stated_packing import Stated
from accessory.checkpoint.opening import open_source
from accessory.errors import CheckpointError
from tests.checkpoint.formats.low_bit_models import V, changed, logits

AUTO_ROUND = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}


@pytest.mark.parametrize(
    ("name", "stated", "message"),
    [
        ("gptq-4", {"bits": 3}, "bits 3 of {}, whose tensors have numbers of 4 bits. Expected bits 4, or the tensors"),
        ("gptq-4", {"bits": "4"}, "bits '4' of {}"),
        ("gptq-4", {"group_size": 128}, "group_size 128 of {}, whose tensors have groups of 64 of 256 channels"),
        ("gptq-4", {"group_size": -1}, "group_size -1 of {}, .* groups of 64"),
        ("gptq-4", {"sym": True}, r"sym True of {}, .* zero points from \d+ to \d+, which would all be 8"),
        ("gptq-3-act", {"desc_act": False}, "desc_act False of {}, .* a g_idx that is not in order"),
        ("awq", {"group_size": 64}, "group_size 64 of {}, whose tensors have groups of 32"),
        ("awq", {"zero_point": False}, "zero_point False of {}, .* Expected zero_point True"),
        ("gptq-4", {"dynamic": {"+:.*v_proj": {"bits": 2}}}, "bits 2 of {}"),
        ("gptq-4", {"dynamic": {"+:(": {}}}, r"'\(' in its quantization_config is no pattern"),
        ("gptq-4", {"dynamic": ["v_proj"]}, r"its dynamic is \['v_proj'\]; expected an object of objects"),
        ("gptq-4", AUTO_ROUND | {"extra_config": {V: {"bits": 2}}}, "bits 2 of {}"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(written, tmp_path: Path, name: str, stated: dict, message: str) -> None:
    """File, key, value, what the tensors say, and what is expected."""
    path = changed(written(name), tmp_path / "contradicted", lambda t: None, **stated)
    with pytest.raises(CheckpointError, match="config.json.*" + message.format(r"model\.layers\.0\.\S+_proj")):
        for tensor in open_source(path).tensors.values():
            tensor.read()


def test_a_file_of_its_own_is_named(written, tmp_path: Path) -> None:
    """AutoAWQ's quant_config.json, whose keys have other names."""
    path = changed(written("awq"), tmp_path / "own_file", lambda t: None)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "quant_config.json").write_text(json.dumps({"w_bit": 4, "q_group_size": 128, "version": "GEMM"}))
    with pytest.raises(CheckpointError, match=r"quant_config.json: .* says group_size 128 of model"):
        open_source(path)


def test_what_is_true_is_taken(written, tmp_path: Path) -> None:
    """A last group that is shorter, exceptions that fit, and a linear that is said to be plain."""
    right = {"bits": 8, "group_size": 1024, "dynamic": {"-:.*q_proj": {}, "+:.*": {"bits": 4, "group_size": 64}}}
    path = changed(written("gptq-4"), tmp_path / "right", lambda t: None, **right)
    assert torch.equal(logits(path), logits(written("gptq-4").path))
    wide = changed(written("gptq_v2-2-rows"), tmp_path / "wide", lambda t: None, group_size=1024)
    assert torch.equal(logits(wide), logits(written("gptq_v2-2-rows").path))


def test_words_for_single_linears() -> None:
    """gptqmodel's first pattern that fits counts; AutoRound's name goes before a pattern."""
    dynamic = {"-:a.b": {}, "+:a": {"bits": 2}, "a.c": {"bits": 3}}
    stated = Stated({"bits": 4, "group_size": 64, "dynamic": dynamic}, Path("config.json"))
    assert (stated.number("a.b", "bits"), stated.number("a.c", "bits"), stated.number("b.a", "bits")) == (None, 2, 4)
    assert (stated.number("a.b", "group_size"), stated.number("a.c", "group_size")) == (None, 64)
    extra = {"a.+": {"bits": 2}, "a.b": {"bits": 8}, "b.a": {"bits": 3}}
    stated = Stated({"w_bit": 4, "extra_config": extra}, Path("config.json"))
    assert [stated.number(name, "bits") for name in ("a.b", "x.a.c", "b.a", "b.c")] == [8, 2, 3, 4]
