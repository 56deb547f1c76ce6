"""Says in words what lies at a path, for error messages: a download that failed rarely looks like what was wanted."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

_HEAD_BYTES = 512
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
"""Bytes that text holds in no encoding by bytes."""
_BEGINNINGS = {
    b"version https://git-lfs": "a Git-LFS pointer (the file itself was not fetched: run `git lfs pull`)",
    b"GGUF": "a GGUF file",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"PAR1": "a Parquet file",
    (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE): "UTF-16 text",
    (b"{", b"["): "a JSON-like text",
}
"""What a file begins with -> what it is."""


def what_is(path: Path) -> str:
    """A noun phrase for what is at `path`, recognised by its first bytes: "a Git-LFS pointer", "an HTML page", ..."""
    if path.is_dir():
        return "a directory"
    if not path.exists():
        return "no such file"
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        return f"a file that cannot be read ({error.strerror})"
    return f"{kind_of(head)} of {path.stat().st_size} bytes" if head else "an empty file"


def may_be_model(path: Path) -> bool:
    """Whether a file can be a tokenizer.model; a Git-LFS pointer or a page that a failed download left cannot."""
    head = _head(path)
    return _is_binary(head) or is_tiktoken(head)


def holds_tiktoken(path: Path) -> bool:
    """Whether a file is a vocabulary in tiktoken's form; False where it cannot be read."""
    return is_tiktoken(_head(path))


def _head(path: Path) -> bytes:
    """The first bytes of the file; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError:
        return b""


def is_tiktoken(head: bytes) -> bool:
    """Whether a file that begins so is a vocabulary in tiktoken's form: a token in base64, and its rank."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} 0\r?\n", head) is not None


def kind_of(head: bytes) -> str:
    """A noun phrase for a file that begins so."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:15].lower().startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page"
    if known := next((kind for beginning, kind in _BEGINNINGS.items() if start.startswith(beginning)), None):
        return known
    if is_tiktoken(head):
        return "a tiktoken vocabulary"
    return "a binary file" if _is_binary(head) and _CONTROL.search(head) else "a text file"


def _is_binary(head: bytes) -> bool:
    try:
        # Incrementally, since the end of the head may cut a character in two, which says nothing about the file.
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < _HEAD_BYTES)
    except UnicodeDecodeError:
        return True
    return b"\x00" in head
