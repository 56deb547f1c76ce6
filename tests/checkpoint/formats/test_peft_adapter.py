"""PEFT adapters read as trained parts: what PEFT itself computes is what must come out here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from accessory.checkpoint.formats.peft_adapter import open_adapter
from accessory.checkpoint.opening import open_source
from accessory.errors import CheckpointError, ConfigError
from accessory.export import export_adapter
from tests.checkpoint.formats.peft_models import (
    LINEARS,
    LORA_AND_NORMS,
    MODELS,
    NORMS,
    TOLERANCE,
    change,
    distance,
    exported,
    logits_of,
    made_by_peft,
    ours,
    refused,
    theirs,
    trained_here,
)

ROOT = Path(__file__).resolve().parents[3]
NF4_TOLERANCE = {"fp32": 1e-5, "bf16": 0.06}
"""Of the largest logit. Measured: 7.6e-7 in fp32; in bf16 0.031, where the base alone differs by 0.022 already."""


@pytest.mark.parametrize("name", MODELS)
def test_what_peft_trained_computes_the_same_here(name: str, base_of, tmp_path: Path) -> None:
    base = base_of(name)
    adapter, expected = made_by_peft(base, tmp_path / "adapter")
    assert distance(logits_of(theirs(base).eval()), expected) > 0.1  # the adapter does something
    assert distance(ours(base, adapter), expected) < TOLERANCE
    assert distance(ours(adapter), expected) < TOLERANCE  # its config names the base


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("name", ["qwen2", "opt", "bloom", "gpt_neox"])
def test_biases(name: str, bias: str, base_of, tmp_path: Path) -> None:
    """ "all" trains the norms' biases too, and with norms saved whole there are two of each in the file."""
    base = base_of(name)
    extra = {"modules_to_save": ["input_layernorm"]} if name in ("bloom", "gpt_neox") else {}
    adapter, expected = made_by_peft(base, tmp_path / "adapter", bias=bias, target_modules=LINEARS[name][:1], **extra)
    assert distance(ours(base, adapter), expected) < TOLERANCE


def test_files_of_older_versions(base_of, tmp_path: Path) -> None:
    """A .bin file, names with the adapter's own in them, and a config of half the keys."""
    base = base_of("llama")
    adapter, expected = made_by_peft(base, tmp_path / "adapter", modules_to_save=["norm"])
    state = load_file(adapter / "adapter_model.safetensors")
    state = {name.replace("_A.", "_A.default.").replace("_B.", "_B.default."): t for name, t in state.items()}
    torch.save(state, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    kept = ("peft_type", "r", "lora_alpha", "target_modules", "bias", "fan_in_fan_out", "enable_lora")
    unsaid = {"rank_pattern": None, "use_rslora": None, "merge_weights": False}
    (adapter / "adapter_config.json").write_text(json.dumps({key: config.get(key) for key in kept} | unsaid))
    assert distance(ours(base, adapter), expected) < TOLERANCE


def test_settings_and_fingerprint(base_of, tmp_path: Path) -> None:
    base = open_source(base_of("qwen2"))
    adapter, _ = made_by_peft(
        base.path,
        tmp_path / "adapter",
        target_modules=["q_proj", "down_proj"],
        lora_dropout=0.25,
        rank_pattern={"q_proj": 2},
    )
    source = open_adapter(adapter, base)
    assert source.settings == {
        "lora_rank": 4, "lora_alpha": 12.0, "lora_dropout": 0.25, "lora_targets": ["w2", "wq"], "norm_tuning": False,
        "bias_tuning": False, "architecture": "qwen2", "rotary_layout": "halves",
    }  # fmt: skip
    assert (source.format, source.llama_type, source.is_delta) == ("PEFT adapter", "llama_peft", True)
    before = source.fingerprint()
    change(adapter, lora_alpha=7)
    assert open_adapter(adapter, base).fingerprint() != before


def test_a_config_of_the_user_cannot_rescale_an_adapter(base_of, tmp_path: Path) -> None:
    """PEFT's own numbers mean another scale here (rslora): refused with both, and what keeps it is taken."""
    base, config = base_of("llama"), tmp_path / "lora.json"
    adapter, expected = made_by_peft(base, tmp_path / "adapter", use_rslora=True)
    for said, now in (('{"lora_alpha": 6}', "1.5"), ('{"lora_alpha": null}', "1"), ('{"lora_rank": 8}', "1.5")):
        config.write_text(said)
        with pytest.raises(ConfigError) as caught:
            ours(base, adapter, llama_config=[config])
        message = str(caught.value)
        assert message.startswith(f"{adapter}: its LoRA was trained with {{'lora_rank': 4, 'lora_alpha': 12.0}}, ")
        assert "a scale of 3; {" in message and f"makes it {now}. " in message
    upstreams = trained_here(base, tmp_path / "upstreams", lora_rank=4)[0].path  # says no alpha: a scale of 1
    stated = json.loads((upstreams / "config.json").read_text())
    (upstreams / "config.json").write_text(json.dumps({k: v for k, v in stated.items() if k != "lora_alpha"}))
    config.write_text('{"lora_alpha": 8}')
    with pytest.raises(ConfigError, match=r"'lora_alpha': None}, a scale of 1; .* makes it 2\. .* a lora_alpha of 4 "):
        ours(base, upstreams, llama_config=[config])
    config.write_text('{"lora_rank": 4, "lora_alpha": 12}')
    assert distance(ours(base, adapter, llama_config=[config]), expected) < TOLERANCE
    config.write_text('{"lora_rank": 8, "lora_alpha": 24}')
    with pytest.raises(CheckpointError, match=r"lora_a.weight has shape \(4, 64\), the model \(8, 64\).*lora_rank"):
        ours(base, adapter, llama_config=[config])
    config.write_text('{"lora_targets": ["wq"]}')
    with pytest.raises(
        CheckpointError, match=r"have no place in this model. .*\(lora_rank, lora_targets, lora_layers\)"
    ):
        ours(base, adapter, llama_config=[config])


def test_an_adapter_cannot_rescale_another(base_of, tmp_path: Path) -> None:
    """Adapters of other linears go side by side where their scales are one; peft, adding them, computes the same."""
    base, both = base_of("llama"), tmp_path / "both.json"
    both.write_text('{"lora_targets": ["wq", "wv"]}')
    query, _ = made_by_peft(base, tmp_path / "query", target_modules=["q_proj"], use_rslora=True)
    value, _ = made_by_peft(base, tmp_path / "value", target_modules=["v_proj"])
    with pytest.raises(ConfigError) as caught:
        ours(base, query, value, llama_config=[both])
    message = str(caught.value)
    assert message.startswith(
        f"{query}: its LoRA was trained with {{'lora_rank': 4, 'lora_alpha': 12.0}}, a scale of 3"
    )
    assert message.endswith("Parts of different scales do not go together; merge one into the base (tools/merge.py).")
    alike, _ = made_by_peft(base, tmp_path / "alike", target_modules=["v_proj"], use_rslora=True)
    model = peft.PeftModel.from_pretrained(theirs(base), query, adapter_name="query")
    model.load_adapter(alike, adapter_name="alike")
    model.base_model.set_adapter(["query", "alike"])
    assert distance(ours(base, query, alike, llama_config=[both]), logits_of(model)) < TOLERANCE


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.lora_embedding_A"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.lora_A"),
        ({"modules_to_save": ["lm_head"]}, "base_model.model.lm_head.weight"),
        ({"use_dora": True}, "DoRA"),
    ],
    ids=["embedding", "head", "whole head", "dora"],
)
def test_what_peft_can_train_and_we_cannot(settings: dict[str, Any], said: str, base_of, tmp_path: Path) -> None:
    adapter, _ = made_by_peft(base_of("llama"), tmp_path / "adapter", **settings)
    message = refused(adapter, base_of("llama"))
    assert said in message
    assert "merge_and_unload" in message


@pytest.mark.parametrize("module", ["h.0.attn.c_attn", "layers.0.mlp.experts.3.up_proj", "layers.2.mlp.up_proj"])
def test_adapter_of_another_model(module: str, adapter: Path, base_of) -> None:
    """What it is and which base it is for; not that its kind of LoRA is not supported."""
    state = {f"base_model.model.model.{module}.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    save_file(state, adapter / "adapter_model.safetensors")
    change(adapter, base_model_name_or_path="some/other")
    message = refused(adapter, base_of("llama"))
    assert f"is for another model: base_model.model.model.{module}.lora_A.weight" in message
    assert "blocks of q_proj, k_proj, v_proj, o_proj, gate_proj, down_proj, up_proj. Give the base it was" in message
    assert message.endswith("which its adapter_config.json calls 'some/other'.") and "merge_and_unload" not in message


def test_another_base(adapter: Path, base_of, tiny_base: Path) -> None:
    message = refused(adapter, base_of("bloom"))
    assert "layers.0.mlp.down_proj.lora_A.weight" in message
    assert "base of type bloom with 2 blocks" in message
    message = refused(adapter, tiny_base)
    assert "another rank or base" in message
    assert "k_proj.lora_A.weight has shape (4, 64); adapter_config.json and the base ask for (4, 128)" in message


def test_missing_parts(adapter: Path, base_of) -> None:
    base, file = base_of("llama"), adapter / "adapter_model.safetensors"
    state = load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    save_file({key: tensor for key, tensor in state.items() if key != name}, file)
    assert f"{name} is missing" in refused(adapter, base)
    file.unlink()
    assert "adapter_model.safetensors or adapter_model.bin is missing" in refused(adapter, base)


@pytest.mark.parametrize("named", [None, "nobody/nothing"])
def test_no_base(named: str | None, adapter: Path) -> None:
    change(adapter, base_model_name_or_path=named)
    assert "give BASE first: --pretrained_path BASE" in refused(adapter, None)


def packed_by_bitsandbytes(base: Path, dtype: torch.dtype, nested: bool) -> nn.Module:
    """The base in NF4 as transformers and bitsandbytes load it. In train mode: eval mode repacks it on a CPU."""
    packing = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=dtype,
    )
    return theirs(base, dtype=dtype, quantization_config=packing, device_map="cpu").train()


@pytest.mark.parametrize("precision", NF4_TOLERANCE)
@pytest.mark.parametrize(("name", "storage"), [("llama", "nf4"), ("gpt_neox", "nf4_single")])
def test_beside_an_nf4_base(name: str, storage: str, precision: str, base_of, tmp_path: Path) -> None:
    """bitsandbytes and PEFT against our packed weights and factors: the same codes, so only rounding is between them.

    With doubly quantized statistics that holds only where no matrix of theirs is several of ours: they share groups.
    """
    base = shutil.copytree(base_of(name), tmp_path / "base")
    theirs(base, dtype=torch.bfloat16).save_pretrained(base)  # what is packed must not be rounded first on one side
    delta = trained_here(base, tmp_path / "delta", **LORA_AND_NORMS)
    adapter = exported(base, tmp_path / "adapter", delta)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = packed_by_bitsandbytes(base, dtype, storage == "nf4")
    alone = logits_of(model)
    expected = logits_of(peft.PeftModel.from_pretrained(model, adapter).train())
    assert distance(alone, expected) > 0.3
    for part in (delta[0].path, adapter):
        found = ours(base, part, dtype=precision, quant=True, quant_type=storage)
        assert distance(found, expected) < NF4_TOLERANCE[precision]


def trained_on(base: Path, adapter: Path, out: Path, python: Callable, *flags: str) -> tuple[Path, str]:
    """What two steps of main_finetune.py upon the adapter leave behind, and what they say."""
    done = python(
        ROOT / "accessory" / "main_finetune.py",
        *("--pretrained_path", base, adapter, "--llama_type", "llama_peft", "--only_save_trainable"),
        *("--data_config", ROOT / "data_example" / "accessory_qa.json", "--device", "cpu", "--max_words", "160"),
        *("--batch_size", "4", "--accum_iter", "1", "--max_steps", "2", "--precision", "fp32"),
        *("--min_lr", "0", "--output_dir", out, *flags),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out / "epoch0-iter2", done.stdout


def test_training_goes_on_from_an_adapter(tiny_base: Path, tmp_path: Path, python) -> None:
    """Base and adapter give everything: rank, targets, family; what it leaves behind needs neither flag."""
    settings = {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 2},
        "modules_to_save": NORMS["llama"],
    }
    adapter, _ = made_by_peft(tiny_base, tmp_path / "adapter", **settings)
    change(adapter, base_model_name_or_path="nobody/nothing")
    saved, _ = trained_on(tiny_base, adapter, tmp_path / "out", python, "--lr", "1e-6")
    expected = open_adapter(adapter, open_source(tiny_base))
    found = open_source(saved)
    assert found.settings["lora_targets"] == ["wq", "wv"]
    assert (found.settings["lora_rank"], found.settings["bias_tuning"]) == (4, False)
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in found.tensors.items():
        torch.testing.assert_close(tensor.read(), expected.tensors[name].read(), atol=1e-5, rtol=0)
    assert not all(torch.equal(t.read(), expected.tensors[name].read()) for name, t in found.tensors.items())
    assert distance(ours(saved), ours(tiny_base, adapter)) < 1e-3
    export_adapter([saved], tmp_path / "again", drop_biases=False)  # run.json knows base and adapter
    again = peft.PeftModel.from_pretrained(theirs(tiny_base), tmp_path / "again").eval()
    assert distance(logits_of(again), ours(saved)) < TOLERANCE


def test_what_an_adapter_lacks_learns(tiny_base: Path, tmp_path: Path, python) -> None:
    """LoRA on one linear of a block, and of a smaller rank on one: widened, it adds nothing and still learns."""
    settings = {"target_modules": r".*(0.*q_proj|1.*(q_proj|v_proj|down_proj))", "rank_pattern": {"v_proj": 2}}
    adapter, expected = made_by_peft(tiny_base, tmp_path / "adapter", **settings)
    assert distance(ours(tiny_base, adapter), expected) < TOLERANCE
    saved, said = trained_on(tiny_base, adapter, tmp_path / "out", python, "--lr", "1e-3")
    assert f"{adapter}: has no LoRA on 2 of 6 w2, wq, wv and has a rank below 4 on 1: what is missing there" in said
    before, after = open_adapter(adapter, open_source(tiny_base)).tensors, open_source(saved).tensors
    assert len(after) == 12
    for name, tensor in after.items():
        new, old = tensor.read(), before[name].read()
        pairs = 0 if name.endswith("lora_a.weight") else 1
        assert (new != old).any(1 - pairs).all(), name  # each of the rank's pairs moved
