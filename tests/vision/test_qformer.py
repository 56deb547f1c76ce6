"""The Q-Former beside transformers' own, and beside float64 formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from accessory.checkpoint.lazy import HeldTensor
from accessory.errors import CheckpointError
from accessory.quant import STORAGES
from accessory.vision import QFormer
from tests.vision import reference
from tests.vision.building import built, images, opened, values

Blip2 = tuple[nn.Module, Path]


def test_features_are_those_of_transformers_and_of_the_papers(blip2: Blip2) -> None:
    """Ten images make two chunks. Training changes nothing: there is no dropout."""
    model, path = blip2
    vision, tensors = opened(path)
    pixels = images(10)
    features = vision.features(built(vision, tensors).train(), pixels)
    assert features.shape == (10, 4, 64)
    torch.testing.assert_close(features, model.get_qformer_features(pixels), atol=1e-5, rtol=0)
    sizes = {"heads": 1, "query_heads": 1, "layers": 2, "query_layers": 3}
    exact = reference.blip2(values(tensors, "qformer."), pixels, **sizes)
    torch.testing.assert_close(features.double(), exact, atol=1e-5, rtol=0)


def test_rows_are_the_projected_features_between_two_tags(blip2: Blip2) -> None:
    """Values and gradients beside autograd in float64; of no image at all, the gradients are zeros."""
    vision, tensors = opened(blip2[1])
    decoder = built(vision, tensors)
    trained = {name: p.requires_grad_() for name, p in decoder.named_parameters() if name.startswith(vision.projection)}
    exact = {name: p.detach().double().requires_grad_() for name, p in trained.items()}
    features = torch.randn(3, 4, 64)
    rows = vision.rows(decoder, features)
    assert rows.shape == (3, vision.place.rows, 32)
    assert (vision.place.rows, vision.place.size, vision.place.before_start) == (6, 28, False)
    parts = [exact[f"qformer_proj.{part}"] for part in ("0.weight", "0.bias", "1.weight", "1.bias")]
    tags = [exact[tag].expand(3, 1, 32) for tag in ("start_img", "end_img")]
    expected = torch.cat((tags[0], reference.projected(*parts, features.double()), tags[1]), 1)
    torch.testing.assert_close(rows.double(), expected, atol=1e-5, rtol=0)
    weights = torch.randn(3, 6, 32)
    (rows * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad.double(), exact[name].grad, atol=1e-4, rtol=1e-4)
        parameter.grad = None
    vision.rows(decoder, features[:0]).sum().backward()
    assert len(trained) == 6
    assert all(parameter.grad.count_nonzero() == 0 for parameter in trained.values())


@pytest.mark.parametrize("storage", ["nf4", "int3_g128"])
def test_packed_encoders_compute_with_the_unpacked_weights(blip2: Blip2, storage: str) -> None:
    """Matrices of 64 and 128 columns are packed, those of 88, which no block divides, are not."""
    vision, tensors = opened(blip2[1])
    packed = built(vision, tensors, STORAGES[storage])
    linears = {
        name: module.weight for name, module in packed.qformer.named_modules() if hasattr(module, "out_features")
    }
    matrices = {
        f"qformer.{name}": module for name, module in packed.qformer.named_modules() if name.endswith(".weight")
    }
    assert len(matrices) == 3 * 6 + 2 * 2 + 2 and not any(p.requires_grad for p in packed.qformer.parameters())
    assert linears and all(weight.shape[1] == 88 for weight in linears.values())
    same = {name: HeldTensor(matrix.unpack(torch.float32)) for name, matrix in matrices.items()}
    pixels = images(2)
    features = vision.features(packed, pixels)
    torch.testing.assert_close(features, vision.features(built(vision, tensors | same), pixels), atol=1e-5, rtol=0)
    assert (features - vision.features(built(vision, tensors), pixels)).abs().max() > 1e-2


def test_upstreams_checkpoint_tells_its_sizes(blip2: Blip2) -> None:
    """What LLaMA2-Accessory saves has the encoder under these names; parts of a language model are no use."""
    vision, tensors = opened(blip2[1])
    needless = {"qformer.language_projection.weight": 0, "layers.0.attention.wq.weight": 0}
    kept = QFormer.from_checkpoint(tensors | dict.fromkeys(("qformer_proj.0.bias", "start_img"), 0) | needless)
    assert kept.keys() == tensors.keys() | {"qformer_proj.0.bias", "start_img"}
    assert QFormer.of_tensors(tensors, "a file").settings == vision.settings
    with pytest.raises(CheckpointError, match=r"a file: qformer\.query_tokens is missing"):
        QFormer.of_tensors({n: t for n, t in tensors.items() if "query_tokens" not in n}, "a file")
    oblong = tensors | {"qformer.vision_model.embeddings.position_embedding": HeldTensor(torch.zeros(1, 7, 88))}
    with pytest.raises(CheckpointError, match=r"patches of shape \(3, 14, 14\) at 7 positions make no square image"):
        QFormer.of_tensors(oblong, "a file")
    narrow = tensors | {"qformer.query_tokens": HeldTensor(torch.zeros(1, 4, 40))}
    with pytest.raises(CheckpointError, match=r"40 wide, and nothing says how many heads.*--vision_path"):
        QFormer.of_tensors(narrow, "a file")


def test_a_qformer_that_reads_text_too_is_used_without_what_only_text_needs() -> None:
    text = ("qformer.encoder.layer.0.intermediate.dense.weight", "qformer.encoder.layer.0.output.dense.bias",
            "qformer.embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight", "itm_head.weight",
            "language_model.model.decoder.embed_tokens.weight", "language_projection.bias")  # fmt: skip
    used = ("query_tokens", "vision_model.post_layernorm.bias", "qformer.layernorm.weight",
            "qformer.encoder.layer.0.attention.output.dense.weight", "qformer.encoder.layer.0.output_query.dense.bias",
            "qformer.encoder.layer.0.intermediate_query.dense.bias")  # fmt: skip
    found = QFormer.from_directory(dict.fromkeys(text + used))
    assert list(found) == [f"qformer.{name}" for name in used]
