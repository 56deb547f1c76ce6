"""Features on disk: the encoder sees an image once, whatever happens to the files."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from accessory.checkpoint.lazy import HeldTensor
from accessory.data.pictures import Picture
from accessory.errors import ConfigError, DataError, DiskFullError
from accessory.model.decoder import Decoder
from accessory.quant import STORAGES
from accessory.vision import Vision
from accessory.vision.feature_cache import FeatureCache, encoder_fingerprint
from tests.vision.building import built, opened


class Encoder:
    """What a run gives the cache, counting the pictures it is asked for."""

    def __init__(self, vision: Vision, decoder: Decoder) -> None:
        self.vision, self.decoder, self.asked = vision, decoder, 0

    def __call__(self, pictures: list[Picture]) -> Tensor:
        self.asked += len(pictures)
        return self.vision.features(self.decoder, torch.stack([picture.pixels() for picture in pictures]))


@pytest.fixture(scope="module")
def encoder(clip: tuple[nn.Module, Path]) -> Encoder:
    """CLIP in bf16."""
    vision, tensors = opened(clip[1])
    return Encoder(vision, built(vision, tensors, dtype=torch.bfloat16))


@pytest.fixture
def pictures(tmp_path: Path) -> list[Picture]:
    """Three files, one of them twice."""
    for number in range(3):
        Image.effect_noise((20 + number, 30), 80).convert("RGB").save(tmp_path / f"{number}.png")
    return [Picture(tmp_path / f"{number}.png", "padded_resize", size=28) for number in (0, 1, 2, 1)]


def cached(encoder: Encoder, path: Path) -> FeatureCache:
    """A cache that knows nothing but its directory."""
    encoder.asked = 0
    return FeatureCache(path / "features", encoder.vision, encoder.decoder)


def test_the_second_epoch_and_the_next_run_do_without_the_encoder(
    encoder: Encoder, pictures: list[Picture], tmp_path: Path
) -> None:
    cache = cached(encoder, tmp_path)
    first = cache.features(pictures, encoder)
    assert (encoder.asked, cache.hits, cache.misses) == (3, 0, 3)
    assert first.dtype == torch.bfloat16 and first.shape == (4, 5, 24) and torch.equal(first[1], first[3])
    assert torch.equal(cache.features(pictures[::-1], encoder), first.flip(0))
    assert cache.features([], encoder).shape == (0, 5, 24)
    assert (encoder.asked, cache.hits, cache.misses) == (3, 3, 3)
    again = cached(encoder, tmp_path)
    assert torch.equal(again.features(pictures, encoder), first) and encoder.asked == 0
    elsewhere = [replace(picture, file=picture.file.read_bytes(), where="another record") for picture in pictures]
    assert torch.equal(again.features(elsewhere, encoder), first) and encoder.asked == 0


def test_whatever_changes_the_features_is_another_entry(
    encoder: Encoder, pictures: list[Picture], tmp_path: Path, clip: tuple[nn.Module, Path]
) -> None:
    """Bytes under the same name, the transform, the dtype, the storage and the weights."""
    cache = cached(encoder, tmp_path)
    cache.features(pictures[:1], encoder)
    assert encoder.asked == 1
    cache.features([replace(pictures[0], transform="resized_center_crop")], encoder)
    pictures[0].file.write_bytes(pictures[1].file.read_bytes())
    cache.features(pictures[:1], encoder)
    assert encoder.asked == 3
    cache.features(pictures[1:2], encoder)  # the same bytes
    assert encoder.asked == 3
    vision, tensors = opened(clip[1])
    name = "clip.vision_model.post_layernorm.bias"
    retrained = tensors | {name: HeldTensor(tensors[name].read() + 1)}
    ways = (
        (tensors, None, torch.float32),
        (tensors, STORAGES["nf4"], torch.bfloat16),
        (retrained, None, torch.bfloat16),
    )
    made = [built(vision, content, storage, dtype) for content, storage, dtype in ways]
    prints = {encoder_fingerprint(vision, decoder) for decoder in (encoder.decoder, *made)}
    assert len(prints) == 4
    assert encoder_fingerprint(vision, built(vision, tensors, dtype=torch.bfloat16)) in prints


@pytest.mark.parametrize("damage", [
    lambda file: file.write_bytes(file.read_bytes()[:-1]),
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
    lambda file: file.write_bytes(bytes(len(file.read_bytes()))),
    lambda file: file.write_bytes(hashlib.blake2b(bytes(10), digest_size=32).digest() + bytes(10)),
    lambda file: os.truncate(file, 1 << 40),
], ids=["cut", "empty", "bit", "zeros", "of another encoder", "a terabyte"])  # fmt: skip
def test_damaged_files_are_computed_again(encoder: Encoder, pictures: list[Picture], tmp_path: Path, damage) -> None:
    cache = cached(encoder, tmp_path)
    first = cache.features(pictures, encoder)
    files = [path for path in (tmp_path / "features").rglob("*") if path.is_file()]
    damage(files[1])
    assert len(files) == 3 and torch.equal(cache.features(pictures, encoder), first)
    assert (encoder.asked, cache.damaged) == (4, 1)
    assert torch.equal(cache.features(pictures, encoder), first) and encoder.asked == 4


def test_several_write_at_once(
    encoder: Encoder, pictures: list[Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slowly; yet whoever reads finds nothing or all of it, and no unfinished file stays."""

    def slowly(path: Path, data: bytes) -> None:
        with path.open("wb", buffering=0) as file:
            for half in (data[:100], data[100:]):
                file.write(half)
                time.sleep(0.002)

    monkeypatch.setattr(Path, "write_bytes", slowly)
    caches = [cached(encoder, tmp_path) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda cache: [cache.features(pictures, encoder) for _ in range(10)], caches))
    assert all(torch.equal(features, found[0][0]) for those in found for features in those)
    assert not any(cache.damaged for cache in caches)
    assert len([path for path in (tmp_path / "features").rglob("*") if path.is_file()]) == 3


def test_what_cannot_be_kept_is_said(
    encoder: Encoder, pictures: list[Picture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cached(encoder, tmp_path)
    with pytest.raises(ConfigError, match=r"random_resized_crop: .*expected resized_center_crop or padded_resize"):
        cache.features([replace(pictures[0], transform="random_resized_crop")], encoder)
    with pytest.raises(DataError, match=r"a\.json, record 3: the image .* is a directory"):
        cache.features([replace(pictures[0], file=tmp_path, where="a.json, record 3")], encoder)
    with pytest.raises(ConfigError, match=r"--cache_features .*0\.png.*: cannot be made"):
        FeatureCache(pictures[0].file, encoder.vision, encoder.decoder)

    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskFullError, match=r"--cache_features: .* cannot be written \(No space left on device\)"):
        cache.features(pictures, encoder)
    assert not [path for path in (tmp_path / "features").rglob("*") if path.is_file()]


def test_pictures_in_memory(encoder: Encoder, tmp_path: Path) -> None:
    """As a page's upload."""
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(stream, "PNG")
    cache, picture = cached(encoder, tmp_path), Picture(stream.getvalue(), "padded_resize", size=28)
    assert torch.equal(cache.features([picture], encoder), encoder([picture]))
