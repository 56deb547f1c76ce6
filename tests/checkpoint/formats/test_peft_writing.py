"""Trained parts of ours written as PEFT adapters: PEFT computes the same, and they come back bit by bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from accessory.checkpoint.formats.peft_adapter import open_adapter
from accessory.checkpoint.lazy import HeldTensor
from accessory.checkpoint.naming import in_rotary_layout
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import model_args_of
from accessory.errors import CheckpointError
from tests.checkpoint.formats.peft_models import (
    LORA_AND_NORMS,
    MODELS,
    TOLERANCE,
    assert_equal_tensors,
    distance,
    exported,
    logits_of,
    ours,
    theirs,
    trained_here,
)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "some",
    [{}, {"lora_targets": ["wq", "wv", "w1"]}, {"lora_targets": ["wo", "w2"], "lora_layers": "1"}],
    ids=["all", "some", "one block"],
)
def test_what_we_trained_computes_the_same_in_peft(name: str, some: dict, base_of, tmp_path: Path) -> None:
    base = base_of(name)
    settings = LORA_AND_NORMS | some
    delta = trained_here(base, tmp_path / "delta", **settings)
    adapter = exported(base, tmp_path / "adapter", delta)
    found = logits_of(peft.PeftModel.from_pretrained(theirs(base), adapter).eval())
    expected = ours(base, delta[0].path)
    assert distance(logits_of(theirs(base).eval()), expected) > 0.1
    assert distance(found, expected) < TOLERANCE
    back = open_adapter(adapter, open_source(base))
    assert_equal_tensors(back, delta[0])
    assert back.settings["lora_targets"] == sorted(delta[1].lora_targets if name in ("llama", "qwen2", "qwen3", "glm")
                                                   or some else set(delta[1].lora_targets) - {"w3"})  # fmt: skip
    assert back.settings.get("lora_layers") == delta[1].lora_layers
    assert (back.settings["lora_rank"], back.settings["lora_alpha"]) == (3, 5.0)
    assert (back.settings["norm_tuning"], back.settings["bias_tuning"]) == (True, False)


@pytest.mark.parametrize("name", ["opt", "bloom", "gpt_neox"])
@pytest.mark.parametrize("rank", [2, -1], ids=["lora", "no lora"])
def test_biases_go_out(name: str, rank: int, base_of, tmp_path: Path) -> None:
    """NormBias needs LoRA of no effect in PEFT's file, which does not come back."""
    base = base_of(name)
    delta = trained_here(base, tmp_path / "delta", lora_rank=rank, lora_targets=["wq", "wk", "w2"])
    adapter = exported(base, tmp_path / "adapter", delta)
    model = peft.PeftModel.from_pretrained(theirs(base), adapter).eval()
    found = logits_of(model)
    assert distance(found, ours(base, delta[0].path)) < TOLERANCE
    back = open_adapter(adapter, open_source(base))
    assert_equal_tensors(back, delta[0])
    assert distance(ours(base, adapter), found) < TOLERANCE
    model.save_pretrained(tmp_path / "again")  # PEFT knows that they are part of it
    assert distance(ours(base, tmp_path / "again"), found) < TOLERANCE


def test_rows_in_metas_layout_go_out_in_theirs(base_of, tmp_path: Path) -> None:
    """The same trained part, its rows of q and k laid out for a base of Meta's."""
    base = base_of("qwen2")
    source, settings = trained_here(base, tmp_path / "delta", **LORA_AND_NORMS)
    args = model_args_of(open_source(base))
    turned = in_rotary_layout(source.tensors, args, "halves", "pairs")
    assert not torch.equal(
        turned["layers.0.attention.wq.lora_b.weight"].read(),
        source.tensors["layers.0.attention.wq.lora_b.weight"].read(),
    )
    meta = replace(source, tensors=turned, settings={**source.settings, "rotary_layout": "pairs"})
    adapter = exported(base, tmp_path / "adapter", (meta, settings))
    assert_equal_tensors(open_adapter(adapter, open_source(base)), source)


def test_biases_without_a_place(base_of, tmp_path: Path) -> None:
    base = base_of("qwen2")  # has biases on q, k and v
    delta = trained_here(base, tmp_path / "delta", lora_rank=2)
    with pytest.raises(CheckpointError, match=r"no bias on .*attention.wo.*feed_forward.w1.*--drop_biases"):
        exported(base, tmp_path / "adapter", delta)
    assert not (tmp_path / "adapter").exists()
    adapter = exported(base, tmp_path / "adapter", delta, drop_biases=True)
    kept = {n: t for n, t in delta[0].tensors.items() if not n.endswith(("wo.bias", "w1.bias", "w2.bias", "w3.bias"))}
    found = logits_of(peft.PeftModel.from_pretrained(theirs(base), adapter).eval())
    zeros = {n: HeldTensor(torch.zeros(t.shape)) for n, t in delta[0].tensors.items() if n not in kept}
    back = open_adapter(adapter, open_source(base))
    assert_equal_tensors(back, replace(delta[0], tensors=kept | zeros))
    assert distance(ours(base, adapter), found) < TOLERANCE
    again = exported(base, tmp_path / "again", (back, delta[1]))  # zeros are no loss
    assert (
        load_file(again / "adapter_model.safetensors").keys() == load_file(adapter / "adapter_model.safetensors").keys()
    )


def test_what_cannot_go_out(base_of, tmp_path: Path) -> None:
    base = base_of("llama")
    source, settings = trained_here(base, tmp_path / "delta", **LORA_AND_NORMS)
    extra = replace(source, tensors={**source.tensors, "tok_embeddings.weight": HeldTensor(torch.ones(2, 2))})
    with pytest.raises(CheckpointError, match=r"tok_embeddings.weight is no LoRA factor"):
        exported(base, tmp_path / "a", (extra, settings))
    with pytest.raises(CheckpointError, match=r"wq.lora_a.weight has shape \(3, 64\), expected \(8, 64\)"):
        exported(base, tmp_path / "b", (source, settings.model_copy(update={"lora_rank": 8})))
    half = {name: t for name, t in source.tensors.items() if not name.endswith("1.attention.wo.lora_b.weight")}
    with pytest.raises(CheckpointError, match=r"layers.1.attention.wo.lora_b.weight is missing"):
        exported(base, tmp_path / "c", (replace(source, tensors=half), settings))
    with pytest.raises(CheckpointError, match="new or empty directory"):
        exported(base, source.path, (source, settings))


def test_what_peft_saves_again_is_read_as_it_stands(base_of, tmp_path: Path) -> None:
    """PEFT drops our header: a fused module then has one rank for all that is in it, and means the same."""
    base = base_of("bloom")
    delta = trained_here(base, tmp_path / "delta", **LORA_AND_NORMS)
    adapter = exported(base, tmp_path / "adapter", delta)
    model = peft.PeftModel.from_pretrained(theirs(base), adapter)
    model.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "adapter_model.safetensors", "pt") as file:
        assert "accessory_parts" not in file.metadata()
    assert open_adapter(tmp_path / "again", open_source(base)).settings["lora_rank"] == 9
    assert distance(ours(base, tmp_path / "again"), ours(base, delta[0].path)) < TOLERANCE
