"""What both encoders share: which one a directory holds, faults of settings, a missing library, memory, chunks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from accessory.checkpoint.load import targets
from accessory.errors import CheckpointError, ConfigError
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.parallel.tensor import WHOLE, slicing_of
from accessory.quant import STORAGES
from accessory.vision import VISIONS, Clip, QFormer, vision_of_directory
from accessory.vision.base import IMAGES_AT_A_TIME
from tests.memory.test_recompute import Peak
from tests.vision.building import built, images, opened


@pytest.mark.parametrize("name", ["qformerv2", "clip"])
def test_images_run_through_in_chunks(name: str, blip2: tuple, clip: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many together as that many need memory for, and each as it is alone."""
    vision, tensors = opened({"qformerv2": blip2, "clip": clip}[name][1])
    decoder, pixels, sizes = built(vision, tensors), images(19), []
    alone = torch.cat([vision.features(decoder, one[None]) for one in pixels])
    encode = type(vision).encode
    monkeypatch.setattr(type(vision), "encode", lambda *how: (sizes.append(len(how[-1])), encode(*how))[1])
    torch.testing.assert_close(vision.features(decoder, pixels), alone, atol=1e-5, rtol=0)
    assert sizes == [IMAGES_AT_A_TIME, IMAGES_AT_A_TIME, 3]
    assert vision.features(decoder, pixels[:0]).shape == (0, *vision.feature_shape)
    with Peak(beside=[*decoder.parameters(), pixels]) as peak:
        vision.features(decoder, pixels)
    assert peak.bytes <= vision.working_bytes(19, torch.float32) <= 1.5 * peak.bytes


def test_recorded_settings_give_the_same_encoder(blip2: tuple[nn.Module, Path], clip: tuple[nn.Module, Path]) -> None:
    for _, path in (blip2, clip):
        vision, _ = opened(path)
        again = VISIONS[vision.name].of_settings(vision.settings.model_dump(), "config.json")
        assert again.settings == vision.settings
    assert not {"qformerv2", "clip"} ^ VISIONS.keys()
    assert not {vision.key for vision in VISIONS.values()} & ModelArgs.model_fields.keys()


def test_the_defaults_are_the_published_encoders() -> None:
    """BLIP-2's 39 layers see 257 tokens and give 32 rows between two tags, CLIP's ViT-L/14 gives 257 rows."""
    blip2, clip = vision_of_directory({"model_type": "blip-2"}, "config.json"), Clip(Clip.Settings())
    assert blip2.settings == QFormer.Settings()
    seen = blip2.settings.vision_config
    assert (seen.num_hidden_layers, seen.tokens, blip2.place.rows, blip2.place.size) == (39, 257, 34, 224)
    assert (blip2.feature_shape, clip.feature_shape, clip.place.rows) == ((32, 768), (257, 768), 257)


@pytest.mark.parametrize(("config", "fault"), [
    ({"model_type": "llama"}, r"c\.json: model_type is 'llama'; expected an image encoder's: blip-2, clip, clip_"),
    ({}, r"c\.json: model_type is None; expected"),
    ({"model_type": "blip-2", "vision_config": [1]}, r"c\.json: found \[1\]; expected an object"),
    ({"model_type": "blip-2", "vision_config": {"num_attention_heads": 9}}, r"9 heads do not divide a width of 1408"),
    ({"model_type": "blip-2", "vision_config": {"image_size": 7}}, r"an image of 7 pixels has no patch of 14"),
    ({"model_type": "blip-2", "num_query_tokens": 0}, r"c\.json: 'num_query_tokens' is 0"),
    ({"model_type": "blip-2", "qformer_config": {"hidden_act": "tanh"}}, r"'qformer_config.hidden_act' is 'tanh'"),
    ({"model_type": "clip", "projection_dim": -1}, r"'vision_config.projection_dim' is -1"),
])  # fmt: skip
def test_faults_of_a_directorys_settings(config: dict, fault: str) -> None:
    with pytest.raises(CheckpointError, match=fault):
        vision_of_directory(config, "c.json")


def test_all_is_frozen_and_whole_on_every_rank() -> None:
    """Also the scales that `nf4_scales` has to train."""
    for kind in VISIONS.values():
        vision = kind(kind.Settings())
        decoder = Decoder(ModelArgs(dim=64, n_layers=1, n_heads=2, vocab_size=16), dtype=torch.bfloat16, ranks=2)
        starts = vision.attach(decoder, torch.bfloat16, STORAGES["nf4_scales"])
        mine = {name: p for name, p in decoder.named_parameters() if vision.owns(name)}
        assert not any(p.requires_grad or slicing_of(p) != WHOLE for p in mine.values())
        assert all(target.slicing == WHOLE for target in targets(decoder) if vision.owns(target.name))
        behind = {name: tuple(p.shape) for name, p in mine.items() if not name.startswith(f"{vision.encoder}.")}
        assert {name: tuple(start(torch.Generator()).shape) for name, start in starts.items()} == behind
        assert vision.plain_weight(decoder).dtype == torch.bfloat16


@pytest.mark.parametrize("vision", VISIONS.values(), ids=list(VISIONS))
def test_without_transformers_it_says_what_to_install(vision: type, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("transformers.models.")]:
        monkeypatch.setitem(sys.modules, name, None)
    decoder = Decoder(ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=16), dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"Images need transformers and Pillow .*pip install -e '\.\[vision\]'"):
        vision(vision.Settings()).attach(decoder, torch.float32, None)
