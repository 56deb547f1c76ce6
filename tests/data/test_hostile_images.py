"""Images and records that are broken or mean harm: each is named and counted by its cause, soon, in little memory."""

import contextlib
import os
import resource
import struct
import time
import zlib

import numpy as np
import pytest

from accessory.data.corpus import build_corpus
from accessory.data.record_images import without_marks
from accessory.errors import DataError

pytest.importorskip("PIL", reason="images are read by Pillow")
from PIL import Image

from accessory.data import image_files
from accessory.data.image_files import ImageFault, check_image
from accessory.data.image_table import ImageFinder
from accessory.data.order import GlobalOrder
from accessory.data.pictures import TRANSFORMS, Picture, PicturePlace
from tests.data.corpora import GOOD
from tests.data.images import encoded, noise, save

PLACE = PicturePlace(4, 16)
OUTSIDE = "lies outside of the directory"


def chunk(kind, data=b""):
    """A part of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, parts=b""):
    """A PNG that says it is so large, and has `parts` but no pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + parts + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND")


def again(photo):
    """The JPEG with its last scan many times."""
    last = photo.rindex(b"\xff\xda")
    return photo[:-2] + photo[last:-2] * 200 + photo[-2:]


def gif(extensions):
    """8 x 8 pixels behind such extensions."""
    data = encoded(noise(8, 8), "GIF")
    head = 13 + (3 << (data[10] & 7) + 1)
    return data[:head] + extensions + b"\0" + data[head:]


def frames(kind):
    pictures = [Image.fromarray(noise(8, 8, seed)) for seed in range(3)]
    return encoded(pictures[0], kind, save_all=True, append_images=pictures[1:])


def hostile(folder):
    """(what a record's `image` is, the cause that is told of it), the files written into `folder`."""
    photo = encoded(noise(64, 64), "JPEG")
    files = {
        "bomb.png": (png(40_000, 40_000), "has more than 50 million pixels"),
        "smaller bomb.png": (png(9_000, 9_000), "has more than 50 million pixels"),
        "many parts.png": (png(8, 8, chunk(b"teXt") * 20_000), "consists of too many parts"),
        "long.png": (png(70_000, 1), "is longer than 65,535 pixels"),
        "broken off.jpg": (photo[: len(photo) // 2], "breaks off"),
        "broken off.png": (encoded(noise(64, 64))[:-300], "breaks off"),
        "broken off.webp": (encoded(noise(64, 64), "WEBP")[:-300], "is damaged"),
        "header only.jpg": (photo[:25], "breaks off"),
        "text.png": (b"This is no image.\n" * 9, "is no JPEG, PNG, WebP or GIF"),
        "script.jpg": (b"#!/bin/sh\nrm -rf /\n", "is no JPEG, PNG, WebP or GIF"),
        "vector.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no JPEG, PNG, WebP or GIF"),
        "photo.tiff": (encoded(noise(8, 8), "TIFF"), "is no JPEG, PNG, WebP or GIF"),
        "empty.jpg": (b"", "is an empty file"),
        "animated.gif": (frames("GIF"), "is animated, expected one picture"),
        "animated.webp": (frames("WEBP"), "is animated, expected one picture"),
        "animated.png": (frames("PNG"), "is animated, expected one picture"),
        "scans.jpg": (again(encoded(noise(64, 64), "JPEG", progressive=True)), "has more than 200 scans"),
        "comment.gif": (gif(b"!\xfe" + (b"\xff" + bytes(255)) * 9_000), "has more than 64 KiB of comments"),
        "comments.gif": (gif(b"!\xfe\1a\0" * 20_000), "has more than 64 KiB of comments"),
        "nothing.gif": (gif(b"!\xf9\0" + (b"\1!" + b"\xff" + bytes(255)) * 900), "an extension without a part"),
        "no number.gif": (gif(b"!\xff\x0bNETSCAPE2.0\0" + b"\1!" * 900), "an extension without a part"),
    }  # fmt: skip
    for name, (data, _) in files.items():
        save(folder / name, data)
    save(folder.parent / "secret.png")
    (folder / "directory.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "out.png").symlink_to("../secret.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    huge = folder / "huge.jpg"
    save(huge, photo)
    os.truncate(huge, 1 << 40)  # without a byte on the disk
    names = [
        ("absent.png", "is not there"), ("directory.png", "is a directory"), ("pipe.png", "is no regular file"),
        ("out.png", OUTSIDE), ("../secret.png", OUTSIDE), (str(folder.parent / "secret.png"), OUTSIDE),
        ("/etc/passwd", OUTSIDE), ("zero.png", OUTSIDE), ("circle.png", "cannot be read"), (".", OUTSIDE),
        ("huge.jpg", "is a file of more than 128 MiB"), ("a\nb.png", "is not there"),
        ("a\0b.png", "that no file can have"),
        ("x" * 5000, "cannot be read"), ("text.png/a.png", "cannot be read"), ("~/a.png", "is not there"),
        ("https://example.com/a.png", "is a URL"), ("data:image/png;base64,AAAA", "is a URL"),
        (7, "'image' is a number"), (["a.png"], "'image' is a list"), ({"bytes": "AA"}, "'image' is an object"),
        (True, "'image' is a truth value"), ("\ud800.png", "half of a surrogate pair"),
    ]  # fmt: skip
    return [(name, cause) for name, (_, cause) in files.items()] + names


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def test_each_is_named_and_counted_and_none_hangs_or_swells(write, tokenizer, folder, monkeypatch):
    cases = hostile(folder)
    good = [folder / f"good {number}.png" for number in range(3)]
    [*map(save, good)]
    used = [GOOD | {"image": path.name} for path in good] + [GOOD | {"image": None}, GOOD | {"image": ""}, GOOD]
    write("x.jsonl", [GOOD | {"image": name} for name, _ in cases] + used)
    path = write("c.yaml", "META: [{path: x.jsonl, root: images}]")
    monkeypatch.setattr(image_files, "_MOST_READS", 10_000)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    corpus = build_corpus(path, tokenizer, max_words=512, pictures=PLACE, threads=2)
    swollen = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert time.monotonic() - began < 60 and swollen < 100, f"{swollen} MiB"
    assert len(corpus) == 6 and [corpus.insets(i) != () for i in range(6)] == [True] * 3 + [False] * 3
    told = {origin[1]: cause for cause, origins in corpus.omissions.skipped.items() for origin in origins}
    assert len(told) == len(cases) >= 35
    for line, (name, cause) in enumerate(cases, 1):
        assert cause in told[line], (name, told[line])
    assert f"skipped 6: its image {OUTSIDE} of images, which root in the YAML names, such as 'out.png'" in corpus.report
    assert "its image is not there, such as 'absent.png'" in corpus.report
    with pytest.raises(DataError, match=r"records cannot be used, more than --max_skipped 0\.1 allows"):
        build_corpus(path, tokenizer, max_words=512, pictures=PLACE, max_skipped=0.1)


def test_what_only_pixels_tell_ends_in_an_error_with_file_and_record(write, tokenizer, folder):
    """Its length and its end are right; what is missing is in the middle."""
    damaged = bytearray(encoded(noise(64, 64)))
    damaged[5000:5100] = bytes(100)
    save(folder / "damaged.png", bytes(damaged))
    write("x.jsonl", [GOOD, GOOD | {"image": "damaged.png"}])
    path = write("c.yaml", "META: [{path: x.jsonl, root: images}]")
    corpus = build_corpus(path, tokenizer, max_words=512, pictures=PLACE)
    order = GlobalOrder(corpus, batch_size=2, accum_iter=1, threads=1)
    (batch,) = order.micro_batches(0, 0)
    expected = r"^document 1 \(.*x\.jsonl:2\): the image '.*damaged\.png' is damaged"
    with pytest.raises(DataError, match=expected):
        batch.insets[0].content.pixels()


def test_odd_images_are_used(write, tokenizer, folder):
    """One pixel, one row of 30,000, four colours, 16 bits, a name with a line break."""
    grey = np.full((8, 8), 99, dtype=np.uint8)
    odd = {
        "one.png": noise(1, 1), "row.png": noise(1, 30_000), "column.png": noise(30_000, 1),
        "deep.png": grey.astype(np.uint16) * 256, "cmyk.jpg": encoded(Image.new("CMYK", (8, 8)), "JPEG"),
        "palette.png": encoded(Image.fromarray(grey).convert("P"), transparency=b"\0" * 256),
        "still.gif": encoded(grey, "GIF"), "one more\nline.png": grey, "trailing.jpg": encoded(grey, "JPEG") + b"more",
        "wrong.png": encoded(grey, "JPEG"), "no suffix": grey, "\u00fc.png": grey,
    }  # fmt: skip
    for name, image in odd.items():
        save(folder / name, image)
    write("x.json", [GOOD | {"image": name} for name in odd])
    path = write("c.yaml", "META: [{path: x.json, root: images}]")
    for transform in TRANSFORMS:
        corpus = build_corpus(path, tokenizer, max_words=512, pictures=PLACE, image_transform=transform)
        assert len(corpus) == len(odd) and "skipped" not in corpus.report
        for index in range(len(odd)):
            assert corpus.insets(index, 1)[0].content.pixels().isfinite().all()
    assert "<image: one more\\nline.png>" in corpus.show([*odd].index("one more\nline.png"))


def test_random_bytes_never_raise_anything_else():
    generator = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        whole = bytearray(encoded(noise(24, 24), kind))
        for _ in range(60):
            data = bytearray(whole)
            for place in generator.integers(0, len(data), 4):
                data[place] = generator.integers(256)
            data = bytes(data[: generator.integers(len(data) // 2, len(data) + 1)])
            try:
                check_image(data)
            except ImageFault as fault:
                assert len(str(fault)) < 99
            with contextlib.suppress(DataError):
                Picture(data, "padded_resize", 8).pixels()


def test_files_are_examined_once_and_kept_flat(folder, monkeypatch):
    from accessory.data import image_table

    examined = []
    monkeypatch.setattr(image_table, "check_image", lambda path: examined.append(path.name))
    finder = ImageFinder([folder, folder])
    names = [f"{number % 700}.png" for number in range(3000)]
    numbers = [number for begin in range(0, 3000, 256) for number in finder.find(0, names[begin : begin + 256])]
    assert sorted(examined) == sorted(set(names)) and numbers[:700] * 2 == numbers[:1400]
    assert len({*zip(numbers, names, strict=True)}) == 700
    assert finder.find(1, ["0.png", None]) == [700, -1]
    table = finder.table(np.array([5, -1, 699, 700]))
    assert [table.name(i) for i in range(4)] == ["5.png", None, "699.png", "0.png"] and table.path(1) is None
    assert table.path(2) == folder / "699.png" and not table.unusable
    assert sum(array.nbytes for array in table.arrays.values()) < 701 * 40


def test_names_of_one_digest_stay_two(folder, monkeypatch):
    from accessory.data import image_table

    monkeypatch.setattr(image_table, "_digest", lambda entry, name: 7)
    for name in ("a.png", "b.png"):
        save(folder / name)
    finder = ImageFinder([folder])
    numbers = [finder.find(0, [name])[0] for name in ("a.png", "b.png", "a.png", "b.png")]
    table = finder.table(np.array(numbers))
    assert [table.name(i) for i in range(4)] == ["a.png", "b.png"] * 2


def test_a_plain_text_loses_the_mark_too():
    assert without_marks("<image>\nA dog.") == "A dog."


def test_a_jpeg_of_many_scans_is_refused_when_it_is_read(monkeypatch):
    """Also one whose header does not say that it has several."""
    photo = encoded(noise(64, 64), "JPEG")
    monkeypatch.setattr(image_files, "_MOST_SCANS", 0)
    check_image(photo)
    with pytest.raises(DataError, match="the image has more than 0 scans"):
        Picture(photo, "padded_resize").pixels()
