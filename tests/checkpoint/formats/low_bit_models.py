"""The tiny model as each of `low_bit_files` writes it, what it computes, and changed copies of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accessory.export import Destination, open_whole
from accessory.meta import MetaModel
from tests.checkpoint.formats import low_bit_files as files
from tests.checkpoint.formats.low_bit_files import Written

TOKENS = torch.arange(40) * 7 % 500
OURS = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}  # fmt: skip
"""Their name of a linear -> ours."""
WRITERS: dict[str, Callable[..., Written]] = {
    "gptq-4-sym": lambda *at: files.write_gptq(*at, 4, 32, sym=True),
    "gptq-4": lambda *at: files.write_gptq(*at, 4, 64),
    "gptq-4-zero-points": lambda *at: files.write_gptq(*at, 4, 32, least=0),
    "gptq-4-act": lambda *at: files.write_gptq(*at, 4, 32, act_order=True),
    "gptq-3-act": lambda *at: files.write_gptq(*at, 3, 64, act_order=True, least=0),
    "gptq_v2-3": lambda *at: files.write_gptq(*at, 3, 32, kind="gptq_v2", least=0),
    "gptq-2": lambda *at: files.write_gptq(*at, 2, 64),
    "gptq_v2-2-rows": lambda *at: files.write_gptq(*at, 2, -1, kind="gptq_v2", least=0),
    "awq": files.write_awq,
    "greenbit": files.write_greenbit,
    "greenbit-plain": lambda *at: files.write_greenbit(*at, plain=True),
    "greenbit-two-levels": files.write_two_levels,
    "greenbit-channel-mix": files.write_channel_mix,
}
V = "model.layers.0.self_attn.v_proj"


def logits(path: Path) -> Tensor:
    """What the model at `path` computes of `TOKENS`, in fp32."""
    return MetaModel.from_pretrained(path, dtype="fp32").logits(TOKENS, (40,))


def converted(source: Path, target: Path, to: str) -> Path:
    """`source` written as another format."""
    model, _, _ = open_whole([source])
    Destination(to, "fp32").write(model, target)
    return target


def changed(made: Written, target: Path, change: Callable[[dict[str, Tensor]], object], **stated: object) -> Path:
    """A copy whose tensors are changed in place; stated: keys of its quantization_config."""
    path = Path(shutil.copytree(made.path, target))
    stored = load_file(path / "model.safetensors")
    change(stored)
    save_file(stored, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    if stated:
        config["quantization_config"] |= stated
    (path / "config.json").write_text(json.dumps(config))
    return path
