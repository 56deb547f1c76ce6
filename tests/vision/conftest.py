"""Tiny random encoders, written by transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from accessory.parallel import groups
from accessory.parallel.groups import Layout

transformers = pytest.importorskip("transformers", reason="the extra vision is not installed")


@pytest.fixture(scope="session", autouse=True)
def layout() -> Iterator[Layout]:
    """This process alone, on the CPU."""
    yield groups.start("cpu")
    groups.stop()


@pytest.fixture(scope="session")
def blip2(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """transformers' BLIP-2, with a language model, and the directory that it wrote.

    The vision transformer is 88 wide, which no block of 64 divides, in one head; the Q-Former's third layer looks too.
    """
    eyes = {"hidden_size": 88, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1,
            "image_size": 28, "patch_size": 14}  # fmt: skip
    reader = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 1,
              "vocab_size": 40, "max_position_embeddings": 8}  # fmt: skip
    text = {"model_type": "opt", "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 40, "word_embed_proj_dim": 16, "max_position_embeddings": 16}  # fmt: skip
    config = transformers.Blip2Config(vision_config=eyes, qformer_config=reader, text_config=text, num_query_tokens=4)
    return _written(transformers.Blip2Model(config), tmp_path_factory.mktemp("blip2"))


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """transformers' CLIP, with its text tower, and the directory that it wrote."""
    eyes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14}  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 40, "max_position_embeddings": 8, "bos_token_id": 2, "eos_token_id": 3}  # fmt: skip
    config = transformers.CLIPConfig(vision_config=eyes, text_config=text, projection_dim=24)
    return _written(transformers.CLIPModel(config), tmp_path_factory.mktemp("clip"))


def _written(model: nn.Module, path: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean="norm" in name.lower() and name.endswith("weight"), std=0.1)
    model.save_pretrained(path)
    return model.eval().requires_grad_(False), path
