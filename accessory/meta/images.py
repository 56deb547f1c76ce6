"""Images that prompts go with: from what a caller holds to the rows of a prompt."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Union

from accessory.data.batch import Inset
from accessory.data.pictures import TRANSFORMS, Picture, PicturePlace
from accessory.errors import ConfigError, check_known

if TYPE_CHECKING:
    import PIL.Image

Image = Union[str, Path, bytes, "PIL.Image.Image", Picture]
"""A file's path, the bytes of one, an image of Pillow, or a `Picture`, which says its own transform."""
TRANSFORM = "padded_resize"
"""How an image is brought to the encoder's size where nothing is said: nothing of it is cut off."""
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def no_images(images: object) -> None:
    """Raise `ConfigError` for images, of a model that sees none."""
    given = images if isinstance(images, list | tuple) else [images]
    if any(image is not None for image in given):
        raise ConfigError(
            f"images is {images!r:.80}, and this model has no image encoder. Load one that was trained with images "
            "(llama_qformerv2, llama_qformerv2_peft), give vision_path, or leave the image out."
        )


def picture_of(image: Image | None, transform: str, place: PicturePlace) -> Picture | None:
    """What an encoder of images laid out as `place` is given of an image, which is read here.

    Raises `ConfigError` for another transform than `TRANSFORMS`, and for what is no image; `DataError` for one that
    cannot be read.
    """
    check_known("image transform", transform, TRANSFORMS)
    if image is None:
        return None
    return (image if isinstance(image, Picture) else Picture(encoded(image), transform, place.size)).reduced()


def encoded(image: Image) -> Path | bytes:
    """An image as a path, or as the bytes of a file. Raises `ConfigError` for what is none."""
    if isinstance(image, str | Path):
        return Path(image)
    if isinstance(image, bytes):
        return image
    # Pillow is not imported: who has made one of its images has done so.
    if (pillow := sys.modules.get("PIL.Image")) and isinstance(image, pillow.Image):
        from PIL import ImageOps

        turned, held = ImageOps.exif_transpose(image), io.BytesIO()
        (turned if turned.mode in _PNG_MODES else turned.convert("RGB")).save(held, "PNG")
        return held.getvalue()
    raise ConfigError(
        f"an image is a {type(image).__name__}: expected a path, the bytes of a file, or an image of Pillow, which is "
        "brought to the encoder's size here."
    )


def with_rows(ids: Sequence[int], picture: Picture | None, place: PicturePlace, start_ids: Sequence[int]) -> list[int]:
    """A prompt's ids, in which the key of a picture stands for each of its rows, where training has them."""
    if picture is None:
        return list(ids)
    start = place.start(ids, start_ids)
    return [*ids[:start], *[key_of(picture, place)] * place.rows, *ids[start:]]


def key_of(picture: Picture, place: PicturePlace) -> int:
    """What stands in a prompt's ids for each row of a picture."""
    return Inset(0, place.rows, picture).key
