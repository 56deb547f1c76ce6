"""A trained part put into its base computes the same, in whichever software loads it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from accessory.checkpoint import save
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.run_record import with_base
from accessory.errors import AccessoryError, CheckpointError
from accessory.export import (
    Destination,
    export_adapter,
    merge,
)
from tests.checkpoint.trained import write_trained
from tests.export.models import TOLERANCE, apart, ours, saved_whole, theirs, written


def test_every_matrix_is_the_sum(tiny_base: Path, part: Path, tmp_path: Path) -> None:
    """File against file: W + 6/4 B A under Hugging Face's names, in the rows' order of Hugging Face's base."""
    merged = load_file(written([part], tmp_path / "hf") / "model.safetensors")
    before, trained = load_file(tiny_base / "model.safetensors"), load_file(part / "trainable.safetensors")
    for their, our in (("self_attn.v_proj", "attention.wv"), ("mlp.down_proj", "feed_forward.w2")):
        name, lora = f"model.layers.1.{their}", f"layers.1.{our}"
        a, b = (trained[f"{lora}.lora_{x}.weight"].double() for x in "ab")
        expected = before[f"{name}.weight"].double() + 1.5 * b @ a
        torch.testing.assert_close(merged[f"{name}.weight"].double(), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(merged[f"{name}.bias"], trained[f"{lora}.bias"])
    assert torch.equal(merged["model.norm.weight"], trained["norm.weight"])
    assert torch.equal(merged["lm_head.weight"], before["lm_head.weight"])
    assert len(merged) == 21 + 14


def test_scales_are_multiplied_in(tiny_base: Path, tmp_path: Path) -> None:
    """s (W + 6/4 B A) and s b, in the rows' order of Hugging Face's base; packed weights and PEFT have no place."""
    part = write_trained(tiny_base, tmp_path / "part", "nf4", scale_tuning=True)
    expected = ours(part, quant=False)
    assert apart(theirs(written([part], tmp_path / "hf", base="full")), expected) < TOLERANCE
    assert apart(ours(written([part], tmp_path / "whole", "accessory")), ours(part)) < TOLERANCE
    assert apart(ours(with_base([part])[0].path), expected) > 0.3
    with pytest.raises(CheckpointError, match="has LoRA, which packed weights cannot take up"):
        written([part], tmp_path / "packed", base="packed")
    alone = write_trained(tiny_base, tmp_path / "scales", "nf4", scale_tuning=True, lora_rank=-1, lora_alpha=None)
    with pytest.raises(CheckpointError, match="has scales, which packed weights cannot take up"):
        written([alone], tmp_path / "packed", base="packed")
    with pytest.raises(CheckpointError, match=r"wq\.scale.* is no LoRA factor, norm or bias of this base"):
        export_adapter([alone], tmp_path / "adapter", drop_biases=True)


def test_transformers_computes_the_trained_model(part: Path, tmp_path: Path) -> None:
    """In fp32, to rounding, and far from the base."""
    expected = ours(part)
    assert apart(theirs(written([part], tmp_path / "hf")), expected) < TOLERANCE
    assert apart(ours(with_base([part])[0].path), expected) > 0.3


@pytest.mark.parametrize("name", ["gpt_neox", "bloom"])
def test_fused_families(base_of, name: str, tmp_path: Path) -> None:
    """q, k and v are trained apart and written in one."""
    trained = write_trained(base_of(name), tmp_path / "part")
    expected = ours(trained)
    assert apart(theirs(written([trained], tmp_path / "hf")), expected) < TOLERANCE
    assert apart(ours(base_of(name)), expected) > 0.1


@pytest.mark.parametrize("to", ["accessory", "gguf", "upstream"])
def test_other_formats(part: Path, to: str, tmp_path: Path) -> None:
    """With biases in all linears."""
    target = tmp_path / f"merged.{to}"
    assert apart(ours(written([part], target, to)), ours(part)) < TOLERANCE


def test_shards_have_an_index(part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file above the limit but for a tensor that is; transformers finds them all."""
    monkeypatch.setattr(save, "SHARD_BYTES", 300_000)
    target = written([part], tmp_path / "hf")
    files = sorted(path.name for path in target.glob("*.safetensors"))
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    stored = {name: load_file(target / name) for name in files}
    assert index["weight_map"] == {name: file for file, tensors in stored.items() for name in tensors}
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in stored.values()]
    assert index["metadata"]["total_size"] == sum(sizes) and max(sizes) <= 300_000
    expected = ours(part)
    assert apart(theirs(target), expected) < TOLERANCE
    assert apart(ours(target), expected) < TOLERANCE


def test_dequantized_is_what_was_trained(nf4_part: Path, tmp_path: Path) -> None:
    """Unasked, it is the model as trained; "full" is the same part on the base in full precision."""
    dequantized = ours(written([nf4_part], tmp_path / "dequantized", "accessory"))
    full = ours(written([nf4_part], tmp_path / "full", "accessory", base="full"))
    assert apart(dequantized, ours(nf4_part)) < TOLERANCE
    assert apart(full, ours(nf4_part, quant=False)) < TOLERANCE
    assert apart(full, dequantized) > 0.03


@pytest.mark.parametrize("targets", [["wq", "w2"], []])
def test_packed_base_becomes_plain(packed: Path, targets: list[str], tmp_path: Path) -> None:
    """Also where LoRA was beside some matrices, or none: transformers could not load a mixture."""
    trained = write_trained(packed, tmp_path / "part", "nf4", lora_targets=targets)
    target = written([trained], tmp_path / "hf")
    assert open_source(target).storage is None
    assert apart(theirs(target), ours(trained)) < TOLERANCE


def test_dropped_biases(tiny_base: Path, part: Path, tmp_path: Path) -> None:
    """The model without those that training added; norms and LoRA are in it."""
    other = Path(shutil.copytree(part, tmp_path / "without"))
    values = load_file(part / "trainable.safetensors")
    zeroed = {name: value * 0 if name.endswith(".bias") else value for name, value in values.items()}
    save_file(zeroed, other / "trainable.safetensors")
    target = written([part], tmp_path / "hf", drop_biases=True)
    assert apart(theirs(target), ours(other)) < TOLERANCE
    assert apart(ours(part), ours(other)) > 0.1
    assert json.loads((target / "config.json").read_text())["attention_bias"] is False


def test_biases_of_the_base_cannot_be_dropped(base_of, tmp_path: Path) -> None:
    """They were trained, too, and stay."""
    trained = write_trained(base_of("biased"), tmp_path / "part")
    assert apart(theirs(written([trained], tmp_path / "hf", drop_biases=True)), ours(trained)) < TOLERANCE


def test_biases_without_a_place(base_of, tmp_path: Path) -> None:
    """Linears and way out are named; each way out works."""
    trained = write_trained(base_of("mistral"), tmp_path / "part")
    for to in ("hf", "meta"):
        with pytest.raises(CheckpointError) as caught:
            written([trained], tmp_path / "hf", to)
        said = str(caught.value)
        assert "qkv_bias True, out_bias True, mlp_bias True" in said
        assert "no place for the biases of wq, wk, wv, wo, w1, w2, w3" in said and "--drop_biases" in said
        assert sorted(path.name for path in tmp_path.iterdir()) == ["part"]
    as_llama = replace(Destination("hf", "fp32"), architecture="llama")
    merge([trained], tmp_path / "llama", as_llama, base=None, drop_biases=False)
    assert apart(theirs(tmp_path / "llama"), ours(trained)) < TOLERANCE
    dropped = written([trained], tmp_path / "dropped", drop_biases=True)
    assert json.loads((dropped / "config.json").read_text())["model_type"] == "mistral"
    theirs(dropped)


def test_moved_base(tiny_base: Path, part: Path, tmp_path: Path) -> None:
    """Base and part by their places, the first of which run.json does not know."""
    moved = Path(shutil.copytree(tiny_base, tmp_path / "moved"))
    assert apart(ours(written([moved, part], tmp_path / "hf")), ours(part)) < TOLERANCE


def test_model_saved_whole(part: Path, tmp_path: Path) -> None:
    """What a run without --only_save_trainable leaves holds its base."""
    target = written([saved_whole(part, tmp_path / "whole")], tmp_path / "hf")
    assert apart(theirs(target), ours(part)) < TOLERANCE


@pytest.mark.parametrize(
    ("which", "base", "message"),
    [
        ("part", "dequantized", "was not trained on a quantized base; leave out --base dequantized"),
        ("packed_part", "full", "is a quantized base: its full weights are gone. Leave out --base full"),
        ("part", "quantized", "--base 'quantized' is neither full, dequantized nor packed"),
        ("base", "full", "cannot be merged: it is a llama, the base itself was trained"),
    ],
)
def test_refusals(
    tiny_base: Path, part: Path, packed: Path, which: str, base: str, message: str, tmp_path: Path
) -> None:
    """Before anything is written."""
    packed_part = write_trained(packed, tmp_path / "packed_part", "nf4")
    path = {"part": part, "packed_part": packed_part, "base": tiny_base}[which]
    with pytest.raises(AccessoryError, match=message):
        written([path], tmp_path / "out", base=base)
    assert [found.name for found in tmp_path.iterdir()] == ["packed_part"]
