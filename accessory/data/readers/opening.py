"""Opens a data file, packed by gzip or not, as a stream of bytes or of lines of text, and words what goes wrong."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from accessory.errors import DataError
from accessory.tokenizer.sniff import kind_of, what_is

_HEAD_BYTES = 512


def data_suffix(path: Path) -> str:
    """The suffix that tells a file's format, in small letters: ".jsonl" for `x.jsonl` and for `x.JSONL.gz`."""
    return Path(path.stem if is_packed(path) else path.name).suffix.lower()


def is_packed(path: Path) -> bool:
    """Whether the name says that gzip has packed the file."""
    return path.suffix.lower() == ".gz"


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of the file, unpacked while they are read. Raises `DataError` where it cannot be read or unpacked."""
    try:
        with gzip.open(path) if is_packed(path) else path.open("rb") as file:
            yield file
    except EOFError as error:
        remedy = "fetch it again, or pack it again with gzip"
        raise DataError(f"{path}: breaks off before the end of what gzip packed; {remedy}.") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: found {what_is(path)}; expected what gzip packed whole ({error}).") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error


def content_of(path: Path) -> str:
    """What the file holds, "a text file of 8 bytes", looking into what gzip packed."""
    if not is_packed(path):
        return what_is(path)
    with opened(path) as file:
        head = file.read(_HEAD_BYTES)
    return f"{kind_of(head) if head else 'an empty file'} (packed by gzip)"


def lines_of(file: BinaryIO, path: Path) -> Iterator[str]:
    r"""The lines of UTF-8 text, each with the "\n" that ends it; a byte order mark is left out.

    Only "\n" ends a line: other characters that Unicode breaks lines at stand in texts. Raises `DataError`.
    """
    before = 0
    for line in file:
        start = len(codecs.BOM_UTF8) if not before and line.startswith(codecs.BOM_UTF8) else 0
        try:
            yield line[start:].decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(path, before + error.start) from error
        before += len(line)


def text_of(path: Path) -> str:
    """The whole file as text, without a byte order mark. Raises `DataError`."""
    with opened(path) as file:
        try:
            return file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise not_utf8(path, error.start) from error


def not_utf8(path: Path, place: int) -> DataError:
    """The error of a file whose byte number `place` is not UTF-8, with the command that would mend it."""
    content = content_of(path)
    found = f"found {content}, which is not UTF-8 (byte {place})"
    encoding = "UTF-16" if "UTF-16" in content else "WINDOWS-1252"
    how = f": iconv -f {encoding} -t UTF-8 {path} > NEW" if "text" in content and not is_packed(path) else ""
    return DataError(f"{path}: {found}; save it as UTF-8{how}.")
