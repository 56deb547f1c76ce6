"""Models of every type that GGUF has, and files of one block that the gguf package alone makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from accessory.checkpoint.load import fill, resolve
from accessory.checkpoint.source import Source
from accessory.checkpoint.whole import WholeModel
from accessory.generate import next_token_logits
from accessory.method import Attachment
from accessory.model.args import ModelArgs, RopeScaling
from accessory.model.decoder import Decoder
from accessory.parallel import groups
from accessory.parallel.data import DataParallel

VOCABULARY = 512
SMALL = {
    "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": VOCABULARY, "hidden_dim": 160,
    "max_seq_len": 64, "norm_eps": 1e-6, "rotary_layout": "halves",
}  # fmt: skip
BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
LAYER_NORMS = {"norm": "layer", "gated": False, "n_kv_heads": 4, **BIASES}
LLAMA_3 = RopeScaling(kind="llama3", factor=8.0)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied, wide heads": {"tie_word_embeddings": True, "head_dim": 32},
    "llama with all biases": BIASES,
    "llama 3": {"rope_theta": 500000.0, "head_dim": 64, "rope_scaling": LLAMA_3},
    "llama 3.2": {"rope_theta": 500000.0, "head_dim": 64, "rope_scaling": RopeScaling(kind="llama3", factor=32.0)},
    "llama linear": {"rope_scaling": RopeScaling(kind="linear", factor=4.0)},
    "mistral": {"architecture": "mistral"},
    "qwen2": {"architecture": "qwen2", "qkv_bias": True, "rope_theta": 1e6},
    "qwen3": {"architecture": "qwen3", "qk_norm": True, "head_dim": 128},
    "baichuan 7B": {"architecture": "baichuan", "n_kv_heads": 4, "n_layers": 32},
    "baichuan 13B": {"architecture": "baichuan", "n_kv_heads": 4, "n_layers": 40, "position": "alibi"},
    "internlm": {"architecture": "internlm", "qkv_bias": True, "out_bias": True},
    "internlm2": {"architecture": "internlm2"},
    "internlm3": {"architecture": "internlm3", "head_dim": 32},
    "bloom": {
        "architecture": "bloom", "activation": "gelu_tanh", "embedding_norm": True, "position": "alibi",
        "tie_word_embeddings": True, "hidden_dim": 256, **LAYER_NORMS,
    },
    "gpt_neox": {
        "architecture": "gpt_neox", "activation": "gelu", "parallel_residual": True, "rotary_dim": 4, **LAYER_NORMS
    },
    "qwen3 with biases": {"architecture": "qwen3", "qk_norm": True, "qkv_bias": True, "tie_word_embeddings": True},
    "gpt_neox in turn": {"architecture": "gpt_neox", "activation": "gelu", "rotary_dim": 4, **LAYER_NORMS},
    "glm": {"architecture": "glm", "rotary_dim": 8, "rotary_layout": "pairs", "qkv_bias": True},
    "glm4": {"architecture": "glm4", "rotary_dim": 8, "rotary_layout": "pairs", "norm_placement": "both"},
    "glm4 with biases, wide heads": {
        "architecture": "glm4", "head_dim": 32, "rotary_dim": 16, "rotary_layout": "pairs", "norm_placement": "both",
        "qkv_bias": True, "rope_scaling": RopeScaling(kind="linear", factor=2.0),
    },
    "chatglm": {"architecture": "chatglm", "rotary_dim": 8, "rotary_layout": "pairs", "qkv_bias": True},
}  # fmt: skip


def token_ids() -> Tensor:
    """Thirty of them."""
    return torch.randint(0, VOCABULARY, (30,), generator=torch.Generator().manual_seed(1))


def as_source(model: WholeModel) -> Source:
    """A model as if it had been opened."""
    return Source(Path("memory"), "memory", [], model.tensors, settings=model.args.model_dump())


def write_raw(path: Path, tensors: dict[str, Any] | None = None, architecture: str = "llama", **fields: Any) -> Path:
    """A file of one block, made by the package alone; `fields` replace its metadata, None leaves one out.

    A tensor is an array of fp32, or (bytes, type).
    """
    stated = {
        "embedding_length": 64, "block_count": 1, "feed_forward_length": 128, "context_length": 64,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
        **fields,
    }  # fmt: skip
    shapes = {
        "token_embd": (32, 64), "output_norm": (64,), "blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,),
        "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64),
        "blk.0.ffn_gate": (128, 64), "blk.0.ffn_up": (128, 64), "blk.0.ffn_down": (64, 128),
    }  # fmt: skip
    random = np.random.default_rng(0)
    held: dict[str, Any] = {
        f"{name}.weight": random.standard_normal(shape, np.float32) for name, shape in shapes.items()
    }
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in stated.items():
        add = {float: writer.add_float32, str: writer.add_string, list: writer.add_array, bool: writer.add_bool}
        if value is not None:
            add.get(type(value), writer.add_uint64)(
                key if "." in key and key[0] == "s" else f"{architecture}.{key}", value
            )
    for name, value in (held | (tensors or {})).items():
        if value is None:
            continue
        data, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(args: ModelArgs, source: Source) -> Tensor:
    """Of `token_ids`, by a model of these settings and weights: [30, V] fp32."""
    decoder, layout = Decoder(args, dtype=torch.float32), groups.start("cpu")
    tensors = resolve(decoder, [source], Attachment(), initialize=False)
    fill(decoder, tensors, Attachment(), layout, DataParallel(layout, "sdp", base_is_trained=False))
    with torch.no_grad():
        return next_token_logits(decoder.eval(), decoder(token_ids(), decoder.sequences((30,))))
