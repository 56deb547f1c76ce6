"""adapter_config.json: all that it may say, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from accessory.checkpoint.formats.peft_adapter import open_adapter
from accessory.checkpoint.opening import open_source
from tests.checkpoint.formats.peft_models import (
    LINEARS,
    NORMS,
    TOLERANCE,
    assert_equal_tensors,
    change,
    distance,
    made_by_peft,
    ours,
    refused,
)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.*": 7}, "alpha_pattern": {"v_proj": 3, "o_proj": 32}},
        {"rank_pattern": {"down_proj": 8}, "use_rslora": True},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
        {"target_modules": r".*\.(0\.self_attn\.[qv]|1\.mlp\.up)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
        {"modules_to_save": NORMS["llama"]},
        {"modules_to_save": ["layers.1.input_layernorm"], "target_modules": ["v_proj"], "lora_dropout": 0.3},
    ],
    ids=["rslora", "patterns", "rank and rslora", "layers", "regex", "all but", "norms", "one norm"],
)  # fmt: skip
def test_what_a_config_may_say(settings: dict[str, Any], base_of, tmp_path: Path) -> None:
    base = base_of("llama")
    adapter, expected = made_by_peft(base, tmp_path / "adapter", **settings)
    assert distance(ours(base, adapter), expected) < TOLERANCE
    blocks = open_adapter(adapter, open_source(base)).settings.get("lora_layers")
    assert blocks == settings.get("layers_to_transform")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"use_dora": True}, "DoRA (use_dora)"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"peft_type": None}, "peft_type None"),
        ({"lora_bias": True}, "(lora_bias)"),
        ({"fan_in_fan_out": True}, "Conv1D"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "replicated layers"),
        ({"target_parameters": ["experts.weight"]}, "target_parameters"),
        ({"alora_invocation_tokens": [4]}, "activated LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base"),
        ({"init_lora_weights": "loftq"}, "'loftq', which changes the base"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
    ],
)
def test_unsupported_kinds(values: dict[str, Any], said: str, adapter: Path, base_of) -> None:
    change(adapter, **values)
    message = refused(adapter, base_of("llama"))
    assert said in message
    assert "Supported: LoRA" in message


def test_targets_that_the_base_lacks(adapter: Path, base_of) -> None:
    """Lists for every kind of model are common; PEFT passes over what is not there, and so do we."""
    base = base_of("llama")
    before = open_adapter(adapter, open_source(base))
    change(adapter, target_modules=[*LINEARS["llama"], "c_attn", "query_key_value"])
    assert_equal_tensors(open_adapter(adapter, open_source(base)), before)
    save_file({}, adapter / "adapter_model.safetensors")
    assert "holds no tensors; expected the LoRA that adapter_config.json names" in refused(adapter, base)


def test_config_and_tensors_disagree(adapter: Path, base_of) -> None:
    base = base_of("llama")
    change(adapter, r=8)
    assert "k_proj.lora_A.weight has shape (4, 64); adapter_config.json and the base ask for (8, 64)" in refused(
        adapter, base
    )
    change(adapter, r=4, target_modules=["q_proj"])
    assert "which adapter_config.json does not name" in refused(adapter, base)
    change(adapter, target_modules=LINEARS["llama"], r="many")
    assert "r" in refused(adapter, base)
    change(adapter, r=4, rank_pattern={"(": 2})
    assert "not a regular expression" in refused(adapter, base)
