"""Mixes: linears of a plain base packed as its quant_strategy.json says, trained, loaded again and merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accessory.blueprint import make_blueprint
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.strategy import GREENBIT_NAMES, STRATEGY_FILE
from accessory.config import FinetuneConfig
from accessory.errors import CheckpointError, ConfigError
from accessory.export import Destination, logit_error, merge
from accessory.finetuning import finetune
from accessory.meta import MetaModel
from accessory.parallel.groups import Layout
from accessory.quant import PackedWeight
from tests.conftest import DATA

TOKENS = torch.arange(40) * 7 % 500
WIDE = {"layers.0.attention.wv", "layers.1.feed_forward.w2"}
LORA = {"lora_rank": 4, "lora_targets": ["wq", "wv"], "bias_tuning": False}


def strategy(wide: set[str] = WIDE) -> dict[str, dict]:
    """Two blocks in GreenBit's schema, these linears in four bits."""
    blocks: dict[str, dict] = {}
    for index in range(2):
        for ours, theirs in GREENBIT_NAMES.items():
            bits = 4 if f"layers.{index}.{ours}" in wide else 2
            entry = {"group_size": {"4": 128, "2": 64}, "bits": [bits], "bits_prop": [1.0], "scale_bits": 4}
            blocks.setdefault(f"model.layers.{index}", {})[theirs] = entry
    return blocks


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny model with a strategy."""
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base" / STRATEGY_FILE).write_text(json.dumps({"measurement": strategy()}))
    return tmp_path / "base"


def drawn(path: Path, **more: object):
    """A blueprint of the mix."""
    how = {"precision": "fp32", "train": True, "llama_type": "llama_peft", "llama_config": [LORA], "quant": True}
    return make_blueprint([open_source(path)], **{"quant_type": "mix2.5"} | how | more)


def test_linears_are_as_the_strategy_says(base: Path) -> None:
    """On meta, so that the plan counts their bytes; --quant_targets leaves some plain."""
    decoder, _ = drawn(base).build(Layout())
    found = {name: module.name for name, module in decoder.named_modules() if isinstance(module, PackedWeight)}
    assert {name.removesuffix(".weight") for name, kind in found.items() if kind == "int4_g128"} == WIDE
    assert len(found) == 14 and set(found.values()) == {"int2_g64", "int4_g128"}
    decoder, _ = drawn(base, quant_targets=("frozen",)).build(Layout())
    found = {name for name, module in decoder.named_modules() if isinstance(module, PackedWeight)}
    assert len(found) == 10 and not any("wv" in name or "wq" in name for name in found)


def test_trained_loaded_and_merged(base: Path, tmp_path: Path) -> None:
    """The trained part knows its mix, and refuses a base whose strategy is another."""
    (tmp_path / "lora.json").write_text(json.dumps(LORA))
    model = finetune(FinetuneConfig(
        pretrained_path=[base], data_config=DATA, output_dir=tmp_path / "out", llama_type="llama_peft",
        llama_config=[tmp_path / "lora.json"], quant=True, quant_type="mix2.5", only_save_trainable=True, device="cpu",
        precision="fp32", max_steps=1, batch_size=2, accum_iter=1, num_workers=0, lr=1e-2, warmup_epochs=0.0,
        max_words=128,
    ))  # fmt: skip
    part = max((tmp_path / "out").glob("epoch*"))
    assert json.loads((part / "run.json").read_text())["quantization"] == "mix2.5"
    loaded = MetaModel.from_pretrained(part, dtype="fp32")
    assert torch.equal(loaded.logits(TOKENS, (40,)), model.eval().logits(TOKENS, (40,)))
    merge([part], tmp_path / "merged", Destination("accessory", "fp32"), base=None, drop_biases=False)
    assert logit_error([part], tmp_path / "merged", precision="fp32").largest < 1e-4
    (base / STRATEGY_FILE).write_text(json.dumps({"measurement": strategy(set())}))
    with pytest.raises(CheckpointError, match=r"fingerprint|no longer"):
        MetaModel.from_pretrained(part, dtype="fp32")


def changed(change: Callable[[dict], object]) -> dict[str, dict]:
    """The strategy, damaged."""
    blocks = strategy()
    change(blocks)
    return blocks


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"measurement": ["q_proj"]},
            r"strategy.json: 'measurement' is \['q_proj'\]; expected an object of blocks",
        ),
        ({}, "'measurement' is None; expected an object of blocks"),
        ({"measurement": changed(lambda b: b.pop("model.layers.1"))}, "has no 'model.layers.1', .*'model.layers.0'"),
        (
            {"measurement": changed(lambda b: b["model.layers.0"].update(v_prog=b["model.layers.0"].pop("v_proj")))},
            "model.layers.0 has no 'v_proj'.*'v_prog'",
        ),
        (
            {"measurement": changed(lambda b: b["model.layers.0"].update(v_proj={"bits": []}))},
            r"model.layers.0.v_proj is \{'bits': \[\]\}; expected bits and their group_size",
        ),
        (
            {
                "measurement": changed(
                    lambda b: b["model.layers.0"].update(v_proj={"bits": [5], "group_size": {"5": 8}})
                )
            },
            "model.layers.0.v_proj has 5 bits in groups of 8; expected 2, 3, 4 bits",
        ),
    ],
)
def test_a_strategy_that_does_not_say_it(base: Path, content: dict, message: str) -> None:
    """Named, with what was expected."""
    (base / STRATEGY_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        drawn(base)


def test_fused_names(base: Path) -> None:
    """Where q, k and v are one matrix they have one width."""
    blocks = strategy(set())
    for block in blocks.values():
        block["qkv_proj"] = {"group_size": {"3": 32}, "bits": [3]}
        for name in ("q_proj", "k_proj", "v_proj"):
            del block[name]
    (base / STRATEGY_FILE).write_text(json.dumps({"measurement": blocks}))
    storages = drawn(base).storages
    assert storages["layers.1.attention.wk"].name == "int3_g32" and storages["layers.1.attention.wo"].name == "int2_g64"


def test_without_a_strategy_the_command_that_makes_one_is_told(tiny_base: Path) -> None:
    """For training, and for packing without data."""
    command = f"tools/quantize.py {tiny_base} TARGET --quant_type mix2.5"
    with pytest.raises(ConfigError, match=rf"mix2.5: {tiny_base} has no quant_strategy.json.*{command}"):
        drawn(tiny_base)
    with pytest.raises(ConfigError, match=r"mix2.5: which linears have 4 bits is measured: give --calibrate"):
        Destination(quant_type="mix2.5")
    with pytest.raises(ConfigError, match=r"mix2.5: a model without a base has no quant_strategy.json"):
        replace(drawn(tiny_base, quant_type="int2_g64"), quant_type="mix2.5").build(Layout())
