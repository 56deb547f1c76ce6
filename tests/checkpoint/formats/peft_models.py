"""Small bases of several types, adapters beside them that PEFT made or we did, and their logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from accessory.checkpoint.formats.peft_adapter import open_adapter
from accessory.checkpoint.formats.peft_writing import write_adapter
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import Source, model_args_of
from accessory.errors import CheckpointError
from accessory.meta import MetaModel
from accessory.method.peft import Peft
from accessory.model.decoder import Decoder
from tests.conftest import copy_tokenizer

VOCABULARY = 512
TOLERANCE = 1e-5  # of the largest logit, fp32; measured: at most 1.2e-6
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {"intermediate_size": 128, "num_key_value_heads": 2, "initializer_range": 0.15}
MODELS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON, **GROUPED),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, **GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, **GROUPED, head_dim=32),
    "opt": lambda: transformers.OPTConfig(**COMMON, init_std=0.15, ffn_dim=128, word_embed_proj_dim=64),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.15
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**COMMON, intermediate_size=128, initializer_range=0.15),
    "glm": lambda: transformers.GlmConfig(**COMMON, **GROUPED, head_dim=16, pad_token_id=0, eos_token_id=1),
}  # fmt: skip
LINEARS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "bloom": ["query_key_value", "self_attention.dense", "dense_h_to_4h", "dense_4h_to_h"],
    "gpt_neox": ["query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"],
    "glm": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
}
LINEARS |= {"qwen2": LINEARS["llama"], "qwen3": LINEARS["llama"]}
NORMS = {"llama": ["input_layernorm", "post_attention_layernorm", "norm"]}
TOKENS = torch.randint(2, VOCABULARY, (24,), generator=torch.Generator().manual_seed(1))
LORA_AND_NORMS = {"lora_rank": 3, "lora_alpha": 5.0, "bias_tuning": False}


def write_base(name: str, directory: Path, tokenizer: Path) -> Path:
    """A Hugging Face directory of the model type `name`, fp32, every tensor random, with the tokenizer of another."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]()).float()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    model.save_pretrained(directory)
    copy_tokenizer(tokenizer, directory)
    return directory


def theirs(base: Path, **options: Any) -> nn.Module:
    """The base as transformers loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(base, **{"dtype": torch.float32, **options})


def logits_of(model: nn.Module) -> Tensor:
    """[T, V] fp32."""
    with torch.no_grad():
        return model(TOKENS[None]).logits[0].float()


def ours(*paths: Path, **options: Any) -> Tensor:
    """Logits of the same tokens here, [T, V]."""
    model = MetaModel.from_pretrained(list(paths), **{"dtype": "fp32", "quant": False, **options})
    return model.logits(TOKENS, (len(TOKENS),))


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def train(model: nn.Module) -> None:
    """Stands for training: every trainable tensor gets random values."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            spread = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + (0.1 if parameter.dim() == 2 else 0.3) * spread


def made_by_peft(base: Path, directory: Path, **settings: Any) -> tuple[Path, Tensor]:
    """An adapter that PEFT made of `settings` and saved, and its logits."""
    name = json.loads((base / "config.json").read_text())["model_type"]
    settings = {"target_modules": LINEARS[name], "r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings}
    model = peft.get_peft_model(theirs(base), peft.LoraConfig(**settings))
    train(model)
    logits = logits_of(model.eval())
    model.save_pretrained(directory)
    return directory, logits


def change(adapter: Path, **values: Any) -> None:
    """Say something else in adapter_config.json."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(adapter: Path, base: Path | None) -> str:
    """What is said when it is opened."""
    with pytest.raises(CheckpointError) as error:
        open_adapter(adapter, open_source(base) if base else None)
    return str(error.value)


def trained_here(base: Path, directory: Path, *, spread: float = 0.1, **settings: Any) -> tuple[Source, Peft.Settings]:
    """A trained part of ours, with random values, as a run leaves it on disk."""
    source = open_source(base)
    args, method = model_args_of(source), Peft.Settings(**settings)
    decoder = Decoder(args, dtype=torch.float32)
    names = Peft(method).attach(decoder).trainable
    shapes = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters() if name in names}
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        centre = source.tensors[name].read().float() if "lora" not in name and name in source.tensors else 0.0
        tensors[name] = centre + spread * torch.randn(shape, generator=generator)
    directory.mkdir()
    save_file(tensors, directory / "trainable.safetensors")
    (directory / "config.json").write_text(json.dumps(args.model_dump() | method.model_dump()))
    (directory / "meta.json").write_text(json.dumps({"llama_type": f"{source.llama_type}_peft"}))
    return open_source(directory), method


def exported(base: Path, target: Path, delta: tuple[Source, Peft.Settings], **options: Any) -> Path:
    """`write_adapter` of it."""
    args = model_args_of(open_source(base))
    write_adapter(delta[0], args, delta[1], target, base_path=str(base), **options)
    return target


def assert_equal_tensors(found: Source, expected: Source) -> None:
    """Bit for bit, in the one rotary layout both are in."""
    assert found.rotary_layout == expected.rotary_layout
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name].read(), tensor.read()), name
