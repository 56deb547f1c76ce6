"""CLIP beside transformers' own, and beside float64 formulas; open_clip's names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from accessory.checkpoint.lazy import HeldTensor
from accessory.errors import CheckpointError
from accessory.quant import STORAGES
from accessory.vision import Clip
from tests.vision import reference
from tests.vision.building import built, images, opened, values

Written = tuple[nn.Module, Path]


def test_features_are_those_of_transformers_and_of_the_paper(clip: Written) -> None:
    """The last norm and the projection of every token."""
    model, path = clip
    vision, tensors = opened(path)
    pixels = images(10)
    features = vision.features(built(vision, tensors), pixels)
    assert features.shape == (10, 5, 24)
    seen = model.vision_model(pixels)
    whole = model.visual_projection(model.vision_model.post_layernorm(seen.last_hidden_state))
    torch.testing.assert_close(features, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(features[:, 0], model.get_image_features(pixels).pooler_output, atol=1e-5, rtol=0)
    exact = reference.clip(values(tensors, "clip."), pixels, heads=2, layers=2)
    torch.testing.assert_close(features.double(), exact, atol=1e-5, rtol=0)


def test_rows_are_the_projected_features(clip: Written) -> None:
    vision, tensors = opened(clip[1])
    decoder = built(vision, tensors)
    trained = {name: p.requires_grad_() for name, p in decoder.named_parameters() if name.startswith(vision.projection)}
    exact = {name: p.detach().double().requires_grad_() for name, p in trained.items()}
    features = torch.randn(3, 5, 24)
    rows = vision.rows(decoder, features)
    assert (vision.place.rows, vision.place.size, vision.place.before_start) == (5, 28, True)
    parts = [
        exact[name] for name in ("clip_proj.weight", "clip_proj.bias", "clip_proj_norm.weight", "clip_proj_norm.bias")
    ]
    expected = reference.projected(*parts, features.double())
    torch.testing.assert_close(rows.double(), expected, atol=1e-5, rtol=0)
    weights = torch.randn(3, 5, 32)
    (rows * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad.double(), exact[name].grad, atol=1e-4, rtol=1e-4)
        parameter.grad = None
    vision.rows(decoder, features[:0]).sum().backward()
    assert len(trained) == 4 and all(parameter.grad.count_nonzero() == 0 for parameter in trained.values())


def test_packed_encoders_compute_with_the_unpacked_weights(clip: Written) -> None:
    """All but CLIP's own projection, which is small and its last."""
    vision, tensors = opened(clip[1])
    packed = built(vision, tensors, STORAGES["nf4"])
    matrices = {f"clip.{name}": module for name, module in packed.clip.named_modules() if name.endswith(".weight")}
    assert len(matrices) == 12 and isinstance(packed.clip.visual_projection, nn.Linear)
    same = {name: HeldTensor(matrix.unpack(torch.float32)) for name, matrix in matrices.items()}
    pixels = images(2)
    features = vision.features(packed, pixels)
    torch.testing.assert_close(features, vision.features(built(vision, tensors | same), pixels), atol=1e-5, rtol=0)
    assert (features - vision.features(built(vision, tensors), pixels)).abs().max() > 1e-2


def open_clip_checkpoint() -> dict[str, Tensor]:
    """What open_clip calls its tensors, with the text tower: ViT of width 64 in one head, two layers, 28 by 14."""
    torch.manual_seed(3)
    w, hidden, out = 64, 96, 24
    sizes = {"class_embedding": (w,), "positional_embedding": (5, w), "proj": (w, out), "conv1.weight": (w, 3, 14, 14),
             "ln_pre.weight": (w,), "ln_pre.bias": (w,), "ln_post.weight": (w,), "ln_post.bias": (w,)}  # fmt: skip
    for number in range(2):
        layer = f"transformer.resblocks.{number}."
        sizes |= {f"{layer}{name}": shape for name, shape in {
            "ln_1.weight": (w,), "ln_1.bias": (w,), "ln_2.weight": (w,), "ln_2.bias": (w,),
            "attn.in_proj_weight": (3 * w, w), "attn.in_proj_bias": (3 * w,), "attn.out_proj.weight": (w, w),
            "attn.out_proj.bias": (w,), "mlp.c_fc.weight": (hidden, w), "mlp.c_fc.bias": (hidden,),
            "mlp.c_proj.weight": (w, hidden), "mlp.c_proj.bias": (w,),
        }.items()}  # fmt: skip
    text = ("positional_embedding", "text_projection", "logit_scale", "token_embedding.weight", "ln_final.weight",
            "transformer.resblocks.0.attn.in_proj_weight", "attn_mask")  # fmt: skip
    made = {f"clip.visual.{name}": 0.2 * torch.randn(shape) for name, shape in sizes.items()}
    return made | {f"clip.{name}": torch.zeros(2, 2) for name in text}


def open_clip_formula(tensors: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Its image encoder in float64, with torch's own attention; last norm and projection apply to all tokens."""
    visual = {name.removeprefix("clip.visual."): tensor.double() for name, tensor in tensors.items()}
    norm = lambda name, x: nn.functional.layer_norm(x, (64,), visual[f"{name}.weight"], visual[f"{name}.bias"])  # noqa: E731
    x = nn.functional.conv2d(pixels.double(), visual["conv1.weight"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat((visual["class_embedding"].expand(len(x), 1, -1), x), 1) + visual["positional_embedding"]
    x = norm("ln_pre", x)
    for number in range(2):
        layer = f"transformer.resblocks.{number}."
        attention = nn.MultiheadAttention(64, 1, batch_first=True, dtype=torch.float64)
        attention.load_state_dict(
            {name.removeprefix(f"{layer}attn."): t for name, t in visual.items() if name.startswith(f"{layer}attn.")}
        )
        y = norm(f"{layer}ln_1", x)
        x = x + attention(y, y, y, need_weights=False)[0]
        y = norm(f"{layer}ln_2", x) @ visual[f"{layer}mlp.c_fc.weight"].t() + visual[f"{layer}mlp.c_fc.bias"]
        y = y * torch.sigmoid(1.702 * y)
        x = x + y @ visual[f"{layer}mlp.c_proj.weight"].t() + visual[f"{layer}mlp.c_proj.bias"]
    return norm("ln_post", x) @ visual["proj"]


def test_open_clips_checkpoint_loads(clip: Written) -> None:
    """Its fused matrix becomes three, its projection is turned, and the text tower is left out."""
    held = open_clip_checkpoint()
    tensors = Clip.from_checkpoint({name: HeldTensor(tensor) for name, tensor in held.items()})
    vision = Clip.of_tensors(tensors, "a file")
    pixels = images(3)
    features = vision.features(built(vision, tensors), pixels)
    exact = open_clip_formula(held, pixels)
    torch.testing.assert_close(features.double(), exact.detach(), atol=1e-5, rtol=0)
    assert Clip.from_checkpoint(tensors).keys() == tensors.keys()
    unknown = {"clip.visual.transformer.resblocks.0.ls_1.gamma": None, "clip.visual.attnpool.weight": None}
    assert Clip.from_checkpoint(unknown) == unknown


def test_a_directory_of_the_image_encoder_alone() -> None:
    """Its config.json has the settings at the top; what it does not state is what transformers takes."""
    vision = Clip.of_directory({"model_type": "clip_vision_model", "patch_size": 16, "projection_dim": 7}, "c.json")
    stated = vision.settings.vision_config
    assert (stated.hidden_size, stated.num_hidden_layers, stated.patch_size, stated.projection_dim) == (768, 12, 16, 7)
    assert (stated.hidden_act, stated.intermediate_size, stated.num_attention_heads) == ("quick_gelu", 3072, 12)
    old = {"model_type": "clip", "vision_config": None, "vision_config_dict": {"hidden_size": 96}, "projection_dim": 9}
    stated = Clip.of_directory(old, "c.json").settings.vision_config
    assert (stated.hidden_size, stated.projection_dim) == (96, 9)
    with pytest.raises(CheckpointError, match=r"c\.json: 'vision_config\.hidden_size' is 'wide'"):
        Clip.of_directory({"model_type": "clip_vision_model", "hidden_size": "wide"}, "c.json")
