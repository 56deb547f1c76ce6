"""Opens image files that anybody may have made: JPEG, PNG, WebP and GIF, in bounded memory."""

from __future__ import annotations

import io
import math
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from accessory.data.gif_structure import gif_fault
from accessory.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_MOST_BYTES, _MOST_SIDE, _MOST_PIXELS = 1 << 27, 65_535, 50_000_000  # of a file, and of its image
_MOST_READS = 500_000  # of a file: hundreds of thousands of empty parts would take minutes
_MOST_SCANS = 200  # of a JPEG; its makers have up to some ten
_LARGE = 10_000_000  # pixels from which images are decoded one at a time, however many threads there are
_VERY_LARGE = 16_000_000  # pixels from which an image is made smaller before anything else
_one_large = Lock()
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"\0\0\0\0IEND\xaeB`\x82", "GIF": b";"}
_ORIENTATION = 0x0112  # in EXIF
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip
"""EXIF's orientation -> what makes the image upright."""


class ImageFault(Exception):
    """Why an image cannot be used, equal for images of the same fault; it ends a sentence that begins "its image"."""


@cache
def image_library() -> ModuleType:
    """`PIL.Image`. Raises `ConfigError` where Pillow is missing."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("images are read by Pillow, which is missing: pip install -e '.[vision]'.") from error
    # It would warn of images that are larger than what is read here anyway, and of EXIF that is not needed.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)
    return Image


def check_image(file: Path | bytes) -> None:
    """Raise `ImageFault` for what is no image, or none that is read here. Raises `ConfigError` without Pillow.

    The header is read, and the last bytes. Pixels are only read where the file does not end as its format does, which
    tells one whose copying broke off.
    """
    with _opened(file) as (image, stream), _naming_faults(), _turn_of(image):
        if image.info.get("progressive"):  # others, which are many, would have to be read whole for it
            _check_scans(image, stream)
        if not _ends_well(image.format, stream):
            image.load()


@contextmanager
def upright_image(file: Path | bytes) -> Iterator[Image]:
    """The image in RGB, upright; what is transparent becomes opaque, in the colour that it has in the file.

    A very large one is made smaller by a whole factor; one large image is held at a time, by whatever thread. Raises
    `ImageFault`; `ConfigError` without Pillow.
    """
    with _opened(file) as (read, stream), _turn_of(read):
        _check_scans(read, stream)
        with _naming_faults():
            read.load()
            turn = _turn(read)
            image = _reduced(_rgb(_reduced(read) if read.mode == "CMYK" else read))
        if image is not read:
            read.close()
        yield image.transpose(image_library().Transpose[turn]) if turn else image


def _turn_of(image: Image) -> AbstractContextManager[object]:
    return _one_large if image.width * image.height > _LARGE else nullcontext()


@contextmanager
def _opened(file: Path | bytes) -> Iterator[tuple[Image, BinaryIO]]:
    """The image, of which only the header is read, and its stream."""
    library = image_library()
    with image_stream(file) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        if size == 0:
            raise ImageFault("is an empty file")
        if size > _MOST_BYTES:
            raise ImageFault(f"is a file of more than {_MOST_BYTES >> 20} MiB")
        if stream.read(4) == b"GIF8" and (fault := gif_fault(b"GIF8" + stream.read())):
            raise ImageFault(fault)
        stream.seek(0)
        try:
            with _naming_faults():
                image = library.open(_FewReads(stream), formats=_FORMATS)
        except (library.UnidentifiedImageError, library.DecompressionBombError) as error:
            known = isinstance(error, library.DecompressionBombError)
            raise ImageFault(_TOO_LARGE if known else "is no JPEG, PNG, WebP or GIF") from error
        _check_size(image)
        yield image, stream


def _check_scans(image: Image, stream: BinaryIO) -> None:
    """Raise `ImageFault` for a JPEG that goes over its pixels again and again, each time by a few bytes."""
    if image.format in ("JPEG", "MPO"):
        place = stream.tell()
        stream.seek(0)
        scans = stream.read().count(b"\xff\xda")
        stream.seek(place)
        if scans > _MOST_SCANS:
            raise ImageFault(f"has more than {_MOST_SCANS} scans")


class _FewReads:
    """A stream that is read from so many times only."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._left = stream, _MOST_READS

    def read(self, size: int = -1) -> bytes:
        """As a stream's. Raises `ImageFault` for one time too many."""
        self._left -= 1
        if self._left < 0:
            raise ImageFault("consists of too many parts")
        return self._stream.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_TOO_LARGE = f"has more than {_MOST_PIXELS // 1_000_000} million pixels"


def _check_size(image: Image) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageFault("has no pixels")
    if max(width, height) > _MOST_SIDE:
        raise ImageFault(f"is longer than {_MOST_SIDE:,} pixels")
    if width * height > _MOST_PIXELS:
        raise ImageFault(_TOO_LARGE)
    with _naming_faults():
        # A camera's JPEG may hold previews behind its image, which Pillow calls frames.
        if image.format not in ("JPEG", "MPO") and getattr(image, "is_animated", False):
            raise ImageFault("is animated, expected one picture")


def image_stream(file: Path | bytes) -> BinaryIO:
    """The bytes of a regular file, or of what is in memory already; never waits for a pipe."""
    if isinstance(file, bytes):
        return io.BytesIO(file)
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise ImageFault("is a directory" if file.is_dir() else "is no regular file")
        return open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except FileNotFoundError as error:
        raise ImageFault("is not there") from error
    except OSError as error:
        raise ImageFault(f"cannot be read ({error.strerror})") from error
    except ValueError as error:  # a zero byte, or half a surrogate pair, in its name
        raise ImageFault("has a name that no file can have") from error


@contextmanager
def _naming_faults() -> Iterator[None]:
    """Turns whatever Pillow raises for a damaged file into an `ImageFault`."""
    try:
        yield
    except (ImageFault, MemoryError):
        raise
    except Exception as error:  # its readers raise OSError, SyntaxError, struct.error, IndexError, KeyError, ...
        library = image_library()
        if isinstance(error, library.UnidentifiedImageError | library.DecompressionBombError):
            raise
        # Without numbers, so that images of the same fault are counted together.
        said = " ".join(re.sub(r"\(.*|\d+", "", str(error)).split()) or type(error).__name__
        raise ImageFault("breaks off" if "truncated" in said.lower() else f"is damaged ({said[:60]})") from error


def _ends_well(kind: str, stream: BinaryIO) -> bool:
    """Whether a file's last bytes are those of its format."""
    place = stream.tell()
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0 if kind == "WEBP" else max(size - len(_ENDS[kind]), 0))
    found = stream.read(12)
    stream.seek(place)
    if kind == "WEBP":  # a RIFF, which begins with its length
        return int.from_bytes(found[4:8], "little") + 8 <= size
    return found == _ENDS[kind]


def _turn(image: Image) -> str | None:
    """What makes the image upright; nothing where its EXIF cannot be read, which does not harm the pixels."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION))
    except Exception:  # SyntaxError, struct.error, OSError, ...
        return None


def _reduced(image: Image) -> Image:
    """The image, smaller by a whole factor if it is very large."""
    shares = image.width * image.height / _VERY_LARGE
    return image.reduce(math.ceil(math.sqrt(shares))) if shares > 1 else image


def _rgb(image: Image) -> Image:
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut at 255 instead of scaling them
        grey = np.asarray(image).clip(0, 65_535) >> 8
        image = image_library().fromarray(grey.astype(np.uint8))
    if image.mode == "P":  # a palette with transparency is warned of unless it goes by RGBA
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
