"""Raw text for tests: documents of many lengths, and files of them in every format."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

from accessory.data.raw.documents import Piece, TextReader
from accessory.data.raw.files import TEXTS, RawFile


def made(count: int, seed: int = 0) -> list[str]:
    """So many different documents, some of them long, with letters of several bytes and line ends."""
    draw = random.Random(seed)
    words = ["sun", "Blüte", "水", "\U0001f600", "line\nend", "a" * 40]
    return [f"{seed}.{n} " + " ".join(draw.choices(words, k=draw.choice((1, 9, 90)))) for n in range(count)]


def as_file(path: Path) -> RawFile:
    """What a run knows of a file."""
    return RawFile(path, TEXTS.get(path.suffix, "packed"), path.stat().st_size)


def written(path: Path, documents: list[str], key: str = "content") -> RawFile:
    """A file of `documents`, in the format of its suffix."""
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow.parquet import write_table

        write_table(pyarrow.table({"id": list(range(len(documents))), key: documents}), path, row_group_size=50)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"n": 1, key: text}, ensure_ascii=False) + "\n" for text in documents))
    else:
        path.write_text("\n\n".join(documents))
    return as_file(path)


def read(reader: TextReader, file: RawFile, size: int) -> list[Piece]:
    """All pieces of a file that is read in blocks of `size` bytes, last block first."""
    spans = [*pairwise(reader.cut(file, size))]
    return [piece for span in spans[::-1] for piece in [*reader.read(file, *span)][::-1]][::-1]
