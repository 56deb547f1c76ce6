"""Keeps features of a frozen encoder on disk, across epochs and runs, so that it sees each image once.

A file for each image, named after all that its features depend on: the image's bytes, how they are cut to a square, and
the encoder with its dtype and storage. It holds a checksum and the numbers. Several processes may share a directory:
each writes under a name of its own and renames the file when it is whole.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from accessory.data.image_files import ImageFault, image_stream
from accessory.data.pictures import CROPPED, TRANSFORMS, Picture
from accessory.errors import ConfigError, DiskFullError
from accessory.model.decoder import Decoder
from accessory.vision.base import Vision

_VERSION = 1  # of the files, and of how a picture's pixels are made
_CHECKSUM = 32  # bytes
_SAMPLE = 1024  # numbers of each tensor that tell one encoder from another


class FeatureCache:
    """Features of one encoder in `directory`, which is made. hits, misses, damaged: pictures so far.

    decoder: with the encoder's weights in place, whole on this process. Raises `ConfigError` where the directory cannot
    be written to.
    """

    def __init__(self, directory: Path, vision: Vision, decoder: Decoder) -> None:
        like = vision.plain_weight(decoder)
        self.shape, self.dtype, self.device = vision.feature_shape, like.dtype, like.device
        self._bytes = _CHECKSUM + math.prod(self.shape) * self.dtype.itemsize
        self.directory = directory / encoder_fingerprint(vision, decoder)
        self.hits = self.misses = self.damaged = 0
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--cache_features {directory}: cannot be made ({error.strerror}).") from error
        check_directory(self.directory)

    def features(self, pictures: list[Picture], encode: Callable[[list[Picture]], Tensor]) -> Tensor:
        """The pictures' features [n, tokens, width] on the encoder's device, the same bits whenever they are asked for.

        encode: gives those [m, tokens, width] of the pictures that are not there yet, each once. Raises `DataError` for
        a file that cannot be read, and `DiskFullError` where there is no room for more.
        """
        names = [self._name(picture) for picture in pictures]
        found = {name: self._read(name) for name in dict.fromkeys(names)}
        absent = {name: picture for name, picture in zip(names, pictures, strict=True) if found[name] is None}
        self.hits, self.misses = self.hits + len(found) - len(absent), self.misses + len(absent)
        if absent:
            made = encode(list(absent.values())).detach().to("cpu", self.dtype)
            for name, features in zip(absent, made, strict=True):
                found[name] = features.contiguous()
                self._write(name, found[name])
        if not names:
            return torch.empty((0, *self.shape), dtype=self.dtype, device=self.device)
        return torch.stack([found[name] for name in names]).to(self.device)

    def _name(self, picture: Picture) -> str:
        """The name of the file that has the picture's features."""
        if picture.transform == CROPPED:
            fixed = " or ".join(name for name in TRANSFORMS if name != CROPPED)
            raise ConfigError(
                f"--cache_features with --image_transform {CROPPED}: each epoch draws other crops, so that no features "
                f"are used twice; expected {fixed}."
            )
        digest = hashlib.blake2b(f"{_VERSION} {picture.transform} {picture.size} ".encode(), digest_size=20)
        try:
            with image_stream(picture.file) as stream:
                while piece := stream.read(1 << 20):
                    digest.update(piece)
        except ImageFault as fault:
            raise picture.unusable(fault) from fault
        except OSError as error:
            raise picture.unusable(ImageFault(f"cannot be read ({error.strerror})")) from error
        return digest.hexdigest()

    def _path(self, name: str) -> Path:
        return self.directory / name[:2] / name

    def _read(self, name: str) -> Tensor | None:
        """Features that are there, whole."""
        try:
            with image_stream(self._path(name)) as stream:
                data = bytearray(stream.read(self._bytes + 1))
        except (ImageFault, OSError):
            return None
        if len(data) != self._bytes or _checksum(memoryview(data)[_CHECKSUM:]) != data[:_CHECKSUM]:
            self.damaged += 1
            return None
        return torch.frombuffer(data, dtype=self.dtype, offset=_CHECKSUM).view(self.shape)

    def _write(self, name: str, features: Tensor) -> None:
        path, numbers = self._path(name), features.view(torch.uint8).numpy().tobytes()
        unfinished = path.with_name(f".{name}.{secrets.token_hex(8)}")
        try:
            path.parent.mkdir(exist_ok=True)
            unfinished.write_bytes(_checksum(numbers) + numbers)
            unfinished.replace(path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else ConfigError
            raise kind(f"--cache_features: {path} cannot be written ({error.strerror}).") from error


def check_directory(directory: Path) -> None:
    """Raise `ConfigError` where `directory` is none, or cannot be made, or nothing can be written into it."""
    there = next((path for path in (directory, *directory.absolute().parents) if os.path.exists(path)), Path.cwd())
    if not there.is_dir():
        raise ConfigError(f"--cache_features {directory}: {there} is a file; expected a directory.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--cache_features {directory}: {there} cannot be written to.")


def encoder_fingerprint(vision: Vision, decoder: Decoder) -> str:
    """What the features depend on besides the image: architecture, dtype, storage, and evenly spread weights.

    Other weights, trained or packed otherwise, give another name.
    """
    digest = hashlib.blake2b(f"{vision.name} {vision.settings.model_dump_json()}".encode(), digest_size=12)
    for name, parameter in getattr(decoder, vision.encoder).named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLE)].contiguous().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _checksum(numbers: bytes | memoryview) -> bytes:
    return hashlib.blake2b(numbers, digest_size=_CHECKSUM).digest()
