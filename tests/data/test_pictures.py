"""The transforms beside resizing by its formula; random crops; what tells pictures apart."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from accessory.data.batch import Inset
from accessory.errors import ConfigError, DataError

pytest.importorskip("PIL", reason="images are read by Pillow")
from PIL import Image

from accessory.data.pictures import CROPPED, TRANSFORMS, Picture, PicturePlace, draw_of
from tests.data.images import BACKGROUND, encoded, noise, resized, save

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
"""As openai/CLIP publishes them."""


def square(data, transform, size=24, **more):
    """The square in 8 bits [size, size, 3], worked out from the normalised pixels."""
    pixels = Picture(data, transform, size, **more).pixels()
    assert pixels.shape == (3, size, size) and pixels.dtype == torch.float32
    found = (pixels.double().permute(1, 2, 0).numpy() * STD + MEAN) * 255
    assert np.abs(found - found.round()).max() < 1e-4
    return found.round()


@pytest.mark.parametrize(("height", "width"), [(40, 60), (61, 37), (9, 90), (24, 24), (5, 3)])
def test_the_middle_at_the_size_of_the_shorter_side(height, width):
    pixels, short = noise(height, width), min(height, width)
    whole = resized(pixels, *(24 if side == short else int(24 * side / short) for side in (height, width)))
    top, left = (round((side - 24) / 2) for side in whole.shape[:2])
    expected = whole[top : top + 24, left : left + 24]
    assert np.abs(square(encoded(pixels), "resized_center_crop") - expected).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(40, 60), (61, 36), (7, 90)])
def test_all_of_an_image_between_bars_of_the_mean_colour(height, width):
    longest = max(height, width)
    padded = np.full((longest, longest, 3), BACKGROUND, dtype=np.uint8)
    top, left = (longest - height) // 2, (longest - width) // 2
    padded[top : top + height, left : left + width] = pixels = noise(height, width)
    assert np.abs(square(encoded(pixels), "padded_resize") - resized(padded, 24, 24)).max() <= 1


def test_random_crops_are_as_large_and_as_wide_as_they_may_be():
    """Of an image whose red tells the column and whose green the row, so that a crop tells where it lies."""
    columns, rows = np.meshgrid(np.arange(250), np.arange(200))
    data = encoded(np.stack([columns, rows, rows], 2).astype(np.uint8))
    found = []
    for draw in range(60):
        pixels = square(data, CROPPED, 50, draw=draw)
        # Away from the edges, where resizing is linear.
        across, down = ((line[40] - line[10]) / 30 * 50 for line in (pixels[25, :, 0], pixels[:, 25, 1]))
        found.append((across, down, pixels[25, 25, 0] - across / 2, pixels[25, 25, 1] - down / 2))
    across, down, left, top = np.array(found).T
    share, ratio = across * down / (200 * 250), across / down
    assert 0.87 < share.min() < 0.92 and 0.98 < share.max() < 1.03
    assert ratio.min() > 0.74 and ratio.max() < 1.36 and np.ptp(ratio) > 0.15
    assert np.ptp(left) > 8 and np.ptp(top) > 8 and left.min() > -2.5 and (left + across).max() < 252.5


def test_what_no_crop_fits_into_gives_its_middle():
    pixels = noise(10, 90)
    expected = resized(pixels[:, 38:51], 24, 24)  # 4/3 as wide as high
    assert np.abs(square(encoded(pixels), CROPPED, draw=5) - expected).max() <= 1


def test_crops_follow_seed_epoch_and_document():
    draws = {draw_of(*numbers) for numbers in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 2, 7), (0, 7, 2)]}
    assert len(draws) == 6 and draw_of(3, 1, 9) == draw_of(3, 1, 9)
    data = encoded(noise(60, 50))
    first, again, other = (square(data, CROPPED, draw=draw) for draw in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_long_images_need_no_large_memory():
    for height, width in ((1, 30_000), (30_000, 1)):
        data = encoded(np.full((height, width, 3), 200, dtype=np.uint8))
        for transform in TRANSFORMS:
            found = square(data, transform, 224)
            assert (found[112 if width > 1 else slice(None), 112 if height > 1 else slice(None)] > 100).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_an_image_upright(orientation):
    """Red above, green to the left of blue, whatever a camera has written."""
    upright = np.zeros((30, 30, 3), dtype=np.uint8)
    upright[:15, :, 0], upright[15:, :15, 1], upright[15:, 15:, 2] = 255, 255, 255
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: upright.transpose(1, 0, 2)[::-1, ::-1], 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "WEBP", "JPEG"):
        how = {"lossless": True} if kind == "WEBP" else {"quality": 95}
        data = encoded(np.ascontiguousarray(stored), kind, exif=exif, **how)
        assert np.abs(square(data, "resized_center_crop", 30) - upright)[2:-2, 2:-2].mean() < 12, kind


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # as it is outside of tests
def test_an_exif_that_cannot_be_read_turns_nothing():
    pixels = noise(16, 16)
    plain = square(encoded(pixels, "PNG"), "resized_center_crop", 16)
    for exif in (b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        assert (square(encoded(pixels, "PNG", exif=exif), "resized_center_crop", 16) == plain).all()


def test_all_kinds_of_pixels_become_red_green_and_blue():
    grey = np.full((8, 8), 200, dtype=np.uint8)
    palette = Image.fromarray(grey).convert("P")
    kinds = {
        "PNG of 16 bits": encoded(grey.astype(np.uint16) * 257), "PNG of greys": encoded(grey),
        "palette with transparency": encoded(palette, "PNG", transparency=bytes(range(256))),
        "CMYK": encoded(Image.new("CMYK", (8, 8), (55, 55, 55, 0)), "JPEG"), "GIF": encoded(grey, "GIF"),
        "transparent": encoded(np.dstack([grey] * 3 + [grey * 0])), "one bit": encoded(grey > 9),
    }  # fmt: skip
    for name, data in kinds.items():
        found = square(data, "resized_center_crop", 8)
        assert np.abs(found - (255 if name == "one bit" else 200)).max() <= 2, name


def test_what_tells_pictures_apart():
    fields = {"file": Path("a"), "transform": CROPPED, "size": 8, "draw": 1}
    changed = ({"file": Path("b")}, {"file": b"a"}, {"transform": "padded_resize"}, {"size": 9}, {"draw": 2})
    one, same = Picture(**fields, where="x.json:1"), Picture(**fields, where="x.json:2")
    others = [Picture(**fields | change) for change in changed]
    assert one == same and hash(one) == hash(same)
    keys = {Inset(0, 4, picture).key for picture in (one, *others)}
    assert len(keys) == 6 == len({one, *others}) and max(keys) < 0
    assert Inset(3, 4, one).key == Inset(0, 4, same).key != Inset(0, 5, one).key


def test_faults_name_the_file_and_the_record(tmp_path):
    whole = save(tmp_path / "a.jpg", noise(50, 50), "JPEG").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[:1000])
    with pytest.raises(DataError, match=rf"^document 3 \(x\.json:4\): the image '{tmp_path}/a\.jpg' breaks off\.$"):
        Picture(tmp_path / "a.jpg", CROPPED, where="document 3 (x.json:4)").pixels()
    with pytest.raises(DataError, match=r"^the image is no JPEG, PNG, WebP or GIF\.$"):
        Picture(b"GIF87", CROPPED).pixels()
    with pytest.raises(ConfigError, match=r"image transform 'padded' is unknown"):
        Picture(b"", "padded")


def test_a_thread_reads_ahead(tmp_path):
    """A pipe that nobody writes to would be waited for: so the file is read at `begun`, not at `pixels`."""
    path = save(tmp_path / "a.png")
    with ThreadPoolExecutor(1) as pool:
        begun = Picture(path, "padded_resize", 8).begun(pool)
        pool.submit(threading.get_ident).result()
        os.unlink(path)
        assert begun.begun(pool) is begun and begun == Picture(path, "padded_resize", 8)
        assert (begun.pixels() == begun.pixels()).all()
        with pytest.raises(DataError, match="is not there"):
            Picture(path, "padded_resize", 8).begun(pool).pixels()


def test_without_the_library_the_message_says_what_to_install(monkeypatch):
    import sys

    from accessory.data.image_files import image_library

    image_library.cache_clear()
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"Pillow, which is missing: pip install -e '\.\[vision\]'"):
        Picture(b"x", CROPPED).pixels()
    image_library.cache_clear()


def test_where_a_picture_stands():
    behind, before = PicturePlace(34), PicturePlace(257, before_start=True)
    assert (behind.start([1, 5], (1,)), behind.start([5, 1], (1,)), behind.start([5], ())) == (1, 0, 0)
    assert before.start([1, 5], (1,)) == 0 and behind.start([7, 1, 5], (7, 1)) == 2
