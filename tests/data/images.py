"""Image files that tests write, and what bicubic resizing is, by its formula."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

BACKGROUND = (122, 116, 104)


def noise(height, width, seed=0):
    """uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **how):
    """The bytes of an image, or of an array."""
    held = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(held, kind, **how)
    return held.getvalue()


def save(path: Path, image=None, kind="PNG", **how):
    """Write an image, without any a small one of its own, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = noise(12, 16, seed=sum(path.name.encode())) if image is None else image
    path.write_bytes(image if isinstance(image, bytes) else encoded(image, kind, **how))
    return path


def resized(pixels, height, width):
    """Pixels [H, W, 3] resized by Keys' cubic convolution (a = -0.5), widened where it makes them fewer; columns first.

    Rounded to 8 bits behind each of the two, as Pillow's are.
    """
    across = _along(pixels.transpose(1, 0, 2), width).transpose(1, 0, 2)
    return _along(across, height)


def _along(pixels, size):
    before = len(pixels)
    scale = before / size
    wide = max(scale, 1)
    found = np.empty((size, *pixels.shape[1:]))
    for row in range(size):
        centre = (row + 0.5) * scale
        places = np.arange(max(int(centre - 2 * wide + 0.5), 0), min(int(centre + 2 * wide + 0.5), before))
        x = np.abs((places + 0.5 - centre) / wide)
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        weights = np.where(x < 1, near, np.where(x < 2, far, 0))
        found[row] = np.tensordot(weights / weights.sum(), pixels[places].astype(float), 1)
    return np.floor(found.clip(0, 255) + 0.5).clip(0, 255)
