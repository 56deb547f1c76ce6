"""Pictures of documents: an image file, how it is cut to the square that an encoder sees, and its pixels."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from accessory.data.image_files import ImageFault, image_library, upright_image
from accessory.errors import DataError, check_known

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of red, green and blue in the images that CLIP was trained on, which BLIP-2 uses, too."""
_LONGEST_RESIZED = 64  # times its shorter side: of a longer image, the middle alone is resized
_LEAST_SHARE, _RATIOS = 0.9, (3 / 4, 4 / 3)  # of a random crop: least area; width beside height
_TRIES = 10
_LONGEST_PADDED = 4096  # pixels of a side beyond which an image is made smaller before it is padded


@dataclass(frozen=True)
class PicturePlace:
    """Where a model takes the picture of a document.

    rows: tokens of the packed sequence that a picture takes; 0 if it enters the model otherwise. size: of the square
    that the encoder sees, in pixels. before_start: whether the rows stand before BOS, and not behind it.
    """

    rows: int
    size: int = 224
    before_start: bool = False

    def start(self, tokens: Sequence[int], start_ids: Sequence[int]) -> int:
        """How many of a document's `tokens` stand before its picture; start_ids: the tokenizer's, such as BOS."""
        begins = list(tokens[: len(start_ids)]) == list(start_ids)
        return len(start_ids) if begins and not self.before_start else 0


@dataclass(frozen=True)
class Picture:
    """An image as an encoder sees it; equal to another one only if both have the same pixels.

    file: where the image lies, or its bytes (JPEG, PNG, WebP or GIF). transform: of `TRANSFORMS`. size: of the square,
    in pixels. draw: what a random crop is drawn from. where: the record it belongs to, for messages.
    """

    file: Path | bytes
    transform: str
    size: int = 224
    draw: int = 0
    where: str = field(default="", compare=False)
    _square: Future[np.ndarray] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_known("image transform", self.transform, TRANSFORMS)

    @property
    def digest(self) -> bytes:
        """Of all that tells it from other pictures."""
        kind, data = (b"bytes", self.file) if isinstance(self.file, bytes) else (b"path", os.fsencode(self.file))
        said = f"{self.transform} {self.size} {self.draw} {len(data)} ".encode()
        return hashlib.blake2b(kind + said + data, digest_size=16).digest()

    def begun(self, pool: Executor) -> Picture:
        """The same picture, which a thread of `pool` reads from now on."""
        return self if self._square else replace(self, _square=pool.submit(self._read))

    def pixels(self) -> Tensor:
        """fp32 [3, size, size]: red, green and blue, less CLIP's mean, over its standard deviation.

        Raises `DataError` with the file and its fault where it cannot be read, `ConfigError` where Pillow is missing.
        """
        square = torch.from_numpy(self._square.result() if self._square else self._read())
        values = square.permute(2, 0, 1).to(torch.float32).div(255)
        return values.sub(torch.tensor(MEAN)[:, None, None]).div(torch.tensor(STD)[:, None, None])

    def reduced(self) -> Picture:
        """A picture of the same pixels, held as a PNG of them: small, and read once. Raises as `pixels` does."""
        held = io.BytesIO()
        image_library().fromarray(self._square.result() if self._square else self._read()).save(held, "PNG")
        return Picture(held.getvalue(), "padded_resize", self.size, where=self.where)

    def unusable(self, fault: ImageFault) -> DataError:
        """What to raise where its file has `fault`."""
        name = "the image" if isinstance(self.file, bytes) else f"the image {str(self.file)!r}"
        return DataError(f"{self.where}: {name} {fault}." if self.where else f"{name} {fault}.")

    def _read(self) -> np.ndarray:
        """The square as uint8 [size, size, 3]."""
        try:
            with upright_image(self.file) as image:
                return np.array(TRANSFORMS[self.transform](image, self.size, self.draw))
        except ImageFault as fault:
            raise self.unusable(fault) from fault


def draw_of(seed: int, epoch: int, document: int) -> int:
    """What the crop of a document is drawn from in an epoch; ranks and steps do not matter."""
    return int(np.random.SeedSequence([seed, epoch, document]).generate_state(1, np.uint64)[0])


def _random_resized_crop(image: Image, size: int, draw: int) -> Image:
    """A part of 90 to 100 % of the area, of a width 3/4 to 4/3 of the height, drawn out to a square.

    Where ten tries find none that fits into the image: the middle, as much of it as may be.
    """
    width, height = image.size
    generator = np.random.default_rng(draw)
    for _ in range(_TRIES):
        area = width * height * generator.uniform(_LEAST_SHARE, 1)
        ratio = math.exp(generator.uniform(*map(math.log, _RATIOS)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = generator.integers(width - across + 1), generator.integers(height - down + 1)
            return _resized(image, size, (int(left), int(top), int(left) + across, int(top) + down))
    across, down = min(width, round(height * _RATIOS[1])), min(height, round(width / _RATIOS[0]))
    left, top = (width - across) // 2, (height - down) // 2
    return _resized(image, size, (left, top, left + across, top + down))


def _resized(image: Image, size: int, box: tuple[int, int, int, int]) -> Image:
    return image.crop(box).resize((size, size), image_library().Resampling.BICUBIC)


def _resized_center_crop(image: Image, size: int, draw: int) -> Image:
    """The shorter side at `size` pixels, of the longer one the middle.

    It is cut after resizing, so that versions of Pillow agree, which differ in parts of pixels. Of an image much longer
    than wide only the middle is resized: 30,000 x 1 pixels would become millions of columns.
    """
    short = min(image.size)
    image = _middle(image, *(min(side, _LONGEST_RESIZED * short) for side in image.size))
    whole = [size if side == short else int(size * side / short) for side in image.size]
    return _middle(image.resize(whole, image_library().Resampling.BICUBIC), size, size)


def _middle(image: Image, width: int, height: int) -> Image:
    left, top = (round((side - wanted) / 2) for side, wanted in zip(image.size, (width, height), strict=True))
    return image.crop((left, top, left + width, top + height))


def _padded_resize(image: Image, size: int, draw: int) -> Image:
    """All of the image, between bars of the mean colour that make it a square."""
    library, longest = image_library(), max(image.size)
    if longest > _LONGEST_PADDED:  # such as 30,000 x 1 pixels, whose square would not fit into memory
        longest, shorter = _LONGEST_PADDED, _LONGEST_PADDED / longest
        image = image.resize([max(round(side * shorter), 1) for side in image.size], library.Resampling.BICUBIC)
    square = library.new("RGB", (longest, longest), tuple(int(255 * part) for part in MEAN))
    square.paste(image, tuple((longest - side) // 2 for side in image.size))
    return square.resize((size, size), library.Resampling.BICUBIC)


CROPPED = "random_resized_crop"
"""The transform that draws another crop in each epoch."""
UNCROPPED = "resized_center_crop"
"""The transform in its place where nothing is trained."""
TRANSFORMS: dict[str, Callable[[Image, int, int], Image]] = {
    CROPPED: _random_resized_crop,
    UNCROPPED: _resized_center_crop,
    "padded_resize": _padded_resize,
}
"""Name for --image_transform -> function of (image in RGB, size, draw) giving a square of `size` pixels."""
