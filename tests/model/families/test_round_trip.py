"""A checkpoint of every family written again: tensor by tensor the same bits, and settings that mean the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from accessory.checkpoint.lazy import HeldTensor
from accessory.checkpoint.naming import in_rotary_layout, theirs_from_ours
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import model_args_of
from accessory.errors import CheckpointError
from accessory.model.args import ModelArgs
from accessory.model.families import ARCHITECTURES
from tests.model.families.matrix import CASES
from tests.model.families.subject import IDS

SMALL = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 96, "hidden_dim": 160}
LAYER = {"norm": "layer", "gated": False, "qkv_bias": True, "out_bias": True, "mlp_bias": True}


@pytest.mark.parametrize("name", CASES)
def test_tensors(name: str, checkpoints) -> None:
    """Theirs -> ours -> theirs, and by way of the other rotary layout; nothing is lost, added or changed."""
    directory = checkpoints[0] / name
    source = open_source(directory)
    args = model_args_of(source)
    names = ARCHITECTURES[args.architecture].names
    files = load_file(directory / "model.safetensors")
    original = {key: value for key, value in files.items() if not names.is_needless(key)}
    if name == "baichuan2":  # goes on as a Baichuan 1
        original["lm_head.weight"] = torch.nn.functional.normalize(original["lm_head.weight"])
    other = {"pairs": "halves", "halves": "pairs"}[args.rotary_layout]
    permuted = in_rotary_layout(source.tensors, args, args.rotary_layout, other)
    for tensors in (source.tensors, in_rotary_layout(permuted, args, other, args.rotary_layout)):
        theirs = theirs_from_ours(tensors, names, args)
        assert theirs.keys() == original.keys()
        assert all(torch.equal(theirs[key].read(), value) for key, value in original.items())
        assert all(theirs[key].shape == value.shape for key, value in original.items())


@pytest.mark.parametrize("name", CASES)
def test_settings(name: str, checkpoints) -> None:
    """What is written reads as the same settings."""
    args = model_args_of(open_source(checkpoints[0] / name))
    architecture = ARCHITECTURES[args.architecture]
    written = json.loads(json.dumps(architecture.write(args)))
    assert architecture.lost(args, architecture.read(written, "again")) == []
    assert written["model_type"] == CASES[name].model_type


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.transformers])
def test_transformers_reads_what_is_written(name: str, checkpoints, tmp_path: Path) -> None:
    """config.json beside the original tensors: the same logits by transformers, to the bit."""
    directory, reference = checkpoints[0] / name, checkpoints[1][name]
    args = model_args_of(open_source(directory))
    config = ARCHITECTURES[args.architecture].write(args) | {"pad_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(directory / "model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    assert type(model) is type(reference.model)
    with torch.no_grad():
        assert torch.equal(model(IDS[None]).logits[0], reference.logits(IDS))


@pytest.mark.parametrize(("model_type", "settings", "lost"), [
    ("llama", {"qk_norm": True}, "qk_norm True"),
    ("llama", {"sliding_window": 8}, "sliding_window 8"),
    ("llama", {"rotary_dim": 8}, "rotary_dim 8"),
    ("llama", {"qkv_bias": True}, "qkv_bias True"),
    ("llama", {"position": "alibi"}, "position 'alibi'"),
    ("llama", {"norm_placement": "both"}, "norm_placement 'both'"),
    ("llama", {"embedding_dim": 32}, "embedding_dim 32"),
    ("llama", {"norm": "layer", "gated": False}, "gated False, norm 'layer'"),
    ("mistral", {"mlp_bias": True}, "mlp_bias True"),
    ("mistral", {"sliding_window": 8, "sliding_layers": [1]}, "sliding_layers [1]"),
    ("mistral", {"rotary_dim": 8}, "rotary_dim 8"),
    ("qwen2", {"qkv_bias": False}, "qkv_bias False"),
    ("qwen3", {"qk_norm": False}, "qk_norm False"),
    ("qwen3", {"qk_norm": True, "rotary_dim": 8}, "rotary_dim 8"),
    ("internlm", {}, "n_kv_heads 2"),
    ("internlm", {"n_kv_heads": 4, "qkv_bias": True, "out_bias": True, "rope_scaling": {"kind": "linear", "factor": 2}},
     "rope_scaling "),
    ("internlm2", {"qkv_bias": True}, "qkv_bias True"),
    ("baichuan", {}, "n_kv_heads 2"),
    ("opt", LAYER | {"n_kv_heads": 4, "position": "learned", "position_offset": 2, "norm_eps": 1e-6}, "norm_eps 1e-06"),
    ("bloom", LAYER | {"n_kv_heads": 4, "position": "alibi", "embedding_norm": True, "activation": "gelu_tanh"},
     "hidden_dim 160"),
    ("gpt_neox", LAYER | {"n_kv_heads": 4, "activation": "gelu", "out_bias": False}, "qkv_bias True"),
    ("glm", {"out_bias": True}, "out_bias True"),
    ("glm4", {}, "norm_placement 'before'"),
    ("chatglm", {"rope_scaling": {"kind": "linear", "factor": 2}}, "rope_scaling "),
    ("chatglm", {"tie_word_embeddings": True}, "tie_word_embeddings True"),
    ("chatglm", {"activation": "gelu"}, "activation 'gelu'"),
])  # fmt: skip
def test_what_a_type_cannot_express(model_type: str, settings: dict, lost: str) -> None:
    """Named; never written as something else."""
    with pytest.raises(CheckpointError) as caught:
        ARCHITECTURES[model_type].write(ModelArgs(**SMALL | settings))
    message = str(caught.value)
    assert message.startswith(f"A {model_type} config.json cannot express this model's ")
    assert lost in message


@pytest.mark.parametrize(("settings", "model_types"), [
    ({}, ("llama", "mistral")),
    ({"qkv_bias": True}, ("qwen2", "glm")),
    ({"rope_scaling": {"kind": "dynamic", "factor": 2.0}}, ("llama", "mistral")),
    ({"rope_scaling": {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}}, ("llama",)),
    ({"sliding_window": 8, "sliding_layers": [0, 1, 2]}, ("mistral",)),
    ({"sliding_window": 8, "qkv_bias": True, "sliding_layers": [0, 2]}, ("qwen2",)),
    ({"sliding_window": 8, "qkv_bias": True}, ("qwen2",)),
])  # fmt: skip
def test_another_type_that_can(settings: dict, model_types: tuple[str, ...]) -> None:
    """A model goes out as any type that means the same."""
    args = ModelArgs(**SMALL | settings)
    for model_type in model_types:
        architecture = ARCHITECTURES[model_type]
        again = architecture.read(architecture.write(args), "again")
        assert [again.window(i) for i in range(3)] == [args.window(i) for i in range(3)]
        kept = ("rope_scaling", "rope_theta", "qkv_bias", "rotary_dim", "hidden_dim", "n_kv_heads")
        assert [getattr(again, key) for key in kept] == [getattr(args, key) for key in kept]


def test_a_tensor_without_a_place() -> None:
    """Named, as is one that lacks what it is fused with."""
    args = ModelArgs(**SMALL, architecture="glm", qkv_bias=True)
    held = HeldTensor(torch.zeros(64, 64))
    tensors = {"layers.0.attention.q_norm.weight": held, "layers.1.feed_forward.w1.weight": held}
    with pytest.raises(CheckpointError) as caught:
        theirs_from_ours(tensors, ARCHITECTURES["glm"].names, args)
    assert str(caught.value) == (
        "In a glm checkpoint there is no place for layers.0.attention.q_norm.weight; layers.1.feed_forward.w3.weight "
        "is missing."
    )
