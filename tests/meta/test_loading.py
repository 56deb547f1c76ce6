"""What a loaded decoder holds, and what of it is trained. Exchanged parts: tests/checkpoint/test_exchange.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from accessory.blueprint import make_blueprint
from accessory.checkpoint.opening import open_source
from accessory.meta.loading import filled
from accessory.model.decoder import Decoder
from accessory.parallel.groups import Layout

NORM, QUERY = "layers.1.ffn_norm.weight", "layers.0.attention.wq."


NORMS, LORA = {"bias_tuning": False}, {"lora_rank": 4, "lora_targets": ["wq"]}


@pytest.mark.parametrize(("settings", "seed"), [(None, None), (None, 3), (NORMS, None), (NORMS, 3), (LORA, 3)])
def test_filled(tiny_base: Path, layout: Layout, settings: dict | None, seed: int | None) -> None:
    """The file's weights; for training with gradients, and what starts at random is the seed's; to ask frozen."""
    sources, tensors = [open_source(tiny_base)], load_file(tiny_base / "model.safetensors")
    how = {"llama_type": "llama_peft" if settings else "llama", "precision": "fp32", "train": seed is not None}
    blueprint = make_blueprint(sources, llama_config=[settings] if settings else [], **how)
    decoder, trained = filled(blueprint, sources, layout, seed=seed)
    parameters = dict(decoder.named_parameters())
    assert torch.equal(parameters["tok_embeddings.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(parameters[NORM], tensors["model.layers.1.post_attention_layernorm.weight"])
    wanted = parameters.keys() if settings is None else {name for name in parameters if "norm" in name}
    if settings == LORA:
        wanted |= {name for name in parameters if "lora" in name or name.endswith("bias")}
    assert trained == wanted and NORM in trained
    asked = {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert asked == (set() if seed is None else trained) and decoder.training == (seed is not None)
    if settings == LORA:
        name = f"{QUERY}lora_a.weight"
        again, other = (filled(blueprint, sources, layout, seed=s)[0].get_parameter(name) for s in (seed, seed + 1))
        assert torch.equal(again, parameters[name]) and not torch.equal(other, parameters[name])


def test_what_is_in_place_is_not_read(tiny_base: Path, layout: Layout) -> None:
    """Only the others are filled."""
    sources = [open_source(tiny_base)]
    blueprint = make_blueprint(sources, llama_type="llama", precision="fp32", train=False)

    def put_in_place(decoder: Decoder) -> set[str]:
        decoder.layers[1].ffn_norm.weight = torch.nn.Parameter(torch.full((128,), 7.0))
        return {NORM}

    decoder, _ = filled(blueprint, sources, layout, put_in_place)
    tensors = load_file(tiny_base / "model.safetensors")
    assert (decoder.layers[1].ffn_norm.weight == 7).all()
    assert torch.equal(decoder.norm.weight, tensors["model.norm.weight"])
