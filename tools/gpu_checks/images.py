"""Image encoders of the published sizes on the card, with random weights: what they compute, how fast, in how much."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from zlib import crc32

import torch
from torch import Tensor

from accessory.checkpoint.lazy import ComputedTensor, HeldTensor, LazyTensor
from accessory.checkpoint.load import fill_module, targets
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.quant import STORAGES, PackedWeight
from accessory.vision import VISIONS, Vision
from tools.gpu_checks.check import Findings, Ground, Skipped, check
from tools.gpu_checks.rates import begin_peak, peak_bytes, seconds_of

TOLERANCE = 3e-2
"""Of bf16 in 39 layers, beside fp32."""
TINY = {
    "qformerv2": {
        "vision_config": {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "image_size": 28},
        "qformer_config": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    },
    "clip": {"vision_config": {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "image_size": 28}},
}


@check(15)
def encoders(ground: Ground, found: Findings) -> None:
    """Features in bf16 beside fp32, and packed as NF4 beside the same weights unpacked; images a second, and memory."""
    if not find_spec("transformers"):
        raise Skipped("needs transformers, of the extra vision")
    for name, kind in VISIONS.items():
        vision = kind.of_settings(ground.pick({}, TINY.get(name, {})), name)
        pixels = torch.randn(ground.pick(16, 2), 3, vision.place.size, vision.place.size, device=ground.device)
        with found.case(name):
            exact = vision.features(_filled(vision, torch.float32, ground), pixels[:2])
            plain = _filled(vision, torch.bfloat16, ground)
            found.close(f"{name} bf16", vision.features(plain, pixels[:2]), exact, TOLERANCE)
            _measure(name, vision, plain, pixels, ground, found)
            packed = _filled(vision, torch.bfloat16, ground, STORAGES["nf4"])
            unpacked = _filled(vision, torch.float32, ground, weights=_unpacked(vision, packed))
            exact = vision.features(unpacked, pixels[:2])
            found.close(f"{name} nf4", vision.features(packed, pixels[:2]), exact, TOLERANCE)
            _measure(f"{name} nf4", vision, packed, pixels, ground, found)


def _measure(name: str, vision: Vision, decoder: Decoder, pixels: Tensor, ground: Ground, found: Findings) -> None:
    """Images a second; the peak beside what the plan counts with, and the matrix that is unpacked."""
    call = partial(vision.features, decoder, pixels)
    found.figures[f"{name}, images/s"] = round(len(pixels) / seconds_of(call, ground), 1)
    before = begin_peak(ground.device)
    call()
    taken = peak_bytes(ground.device) - before
    planned = vision.working_bytes(len(pixels), torch.bfloat16)
    found.figures[f"{name}, MiB"] = {"taken": round(taken / 2**20, 1), "planned": round(planned / 2**20, 1)}
    found.expect(taken <= 1.2 * planned + 2**25, f"{name}: took {taken:,} bytes, the plan counts with {planned:,}")


def _filled(
    vision: Vision,
    dtype: torch.dtype,
    ground: Ground,
    storage: type[PackedWeight] | None = None,
    weights: Mapping[str, LazyTensor] | None = None,
) -> Decoder:
    """A small decoder with the encoder, of the same weights at every call, but for those in `weights`."""
    decoder = Decoder(ModelArgs(dim=64, n_layers=1, n_heads=2, vocab_size=64), dtype=dtype)
    vision.attach(decoder, dtype, storage)
    own = [target for target in targets(decoder) if target.name.startswith(f"{vision.encoder}.")]
    made = {target.name: _random(target.name, target.local_shape, ground) for target in own}
    rest = {target.name for target in targets(decoder)} - made.keys()
    fill_module(decoder, "", made | dict(weights or {}), ground.layout, there=rest)
    vision.place_buffers(decoder, ground.device)
    return decoder


def _random(name: str, shape: tuple[int, ...], ground: Ground) -> LazyTensor:
    """Numbers that depend on the name alone, of a norm's weights around 1."""

    def made(dim: int | None, start: int, stop: int) -> Tensor:
        """The whole, which is all that one rank reads."""
        generator = torch.Generator(ground.device).manual_seed(crc32(name.encode()))
        values = 0.02 * torch.randn(shape, generator=generator, device=ground.device)
        return values + ("norm" in name.lower() and name.endswith("weight"))

    return ComputedTensor(shape, "float32", made)


def _unpacked(vision: Vision, decoder: Decoder) -> dict[str, LazyTensor]:
    matrices = getattr(decoder, vision.encoder).named_modules(prefix=vision.encoder)
    return {name: HeldTensor(m.unpack(torch.float32)) for name, m in matrices if isinstance(m, PackedWeight)}


CHECKS = [encoders]
