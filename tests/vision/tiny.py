"""Tiny random encoders, written by transformers, and what the commands of docs/vision.md take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:  # both are in an extra
    from transformers import Blip2Model, CLIPModel


def write_blip2(path: Path) -> Blip2Model:
    """BLIP-2, with a language model.

    The vision transformer is 88 wide, which no block of 64 divides, in one head; the Q-Former's third layer looks too.
    """
    from transformers import Blip2Config, Blip2Model

    eyes = {"hidden_size": 88, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1,
            "image_size": 28, "patch_size": 14}  # fmt: skip
    reader = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 1,
              "vocab_size": 40, "max_position_embeddings": 8}  # fmt: skip
    text = {"model_type": "opt", "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 40, "word_embed_proj_dim": 16, "max_position_embeddings": 16}  # fmt: skip
    config = Blip2Config(vision_config=eyes, qformer_config=reader, text_config=text, num_query_tokens=4)
    return _written(Blip2Model(config), path)


def write_clip(path: Path) -> CLIPModel:
    """CLIP, with its text tower."""
    from transformers import CLIPConfig, CLIPModel

    eyes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14}  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 40, "max_position_embeddings": 8, "bos_token_id": 2, "eos_token_id": 3}  # fmt: skip
    return _written(CLIPModel(CLIPConfig(vision_config=eyes, text_config=text, projection_dim=24)), path)


def write_seen(folder: Path) -> None:
    """BLIP2, CLIP, IMAGE.jpg, and IMAGES.json with four questions about images in `photos`."""
    from PIL import Image

    write_blip2(folder / "BLIP2")
    write_clip(folder / "CLIP")
    (folder / "photos").mkdir()
    numbers, records = np.random.default_rng(0), []
    for name in ("a", "b", "c", "d"):
        Image.fromarray(numbers.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / "photos" / f"{name}.jpg")
        records.append({"image": f"photos/{name}.jpg", "instruction": "Which letter is it?", "output": name})
    (folder / "IMAGE.jpg").write_bytes((folder / "photos" / "a.jpg").read_bytes())
    (folder / "IMAGES.json").write_text(json.dumps(records))


def _written(model: nn.Module, path: Path) -> nn.Module:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean="norm" in name.lower() and name.endswith("weight"), std=0.1)
    model.save_pretrained(path)
    return model.eval().requires_grad_(False)
