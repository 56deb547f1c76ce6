"""A vocabulary of bytes, data files and corpora, all made on the spot."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from accessory.data.corpus import Corpus, build_corpus
from accessory.tokenizer import Tokenizer


class Bytes(Tokenizer):
    """UTF-8 bytes from id 3 on, so that every id in a test can be worked out by hand.

    A text that continues nothing opens with id 259, as a made-up leading space would; an empty text has no ids.
    """

    def __init__(self, *, add_bos: bool = True, name: str = "bytes") -> None:
        self.vocab_size, self.bos_id, self.eos_id, self.add_bos = 260, 1, 2, add_bos
        self.fingerprint = hashlib.sha256(f"{name}{add_bos}".encode()).hexdigest()
        self.calls = 0

    def encode_batch(self, texts, *, continuation=False, threads=1):
        self.calls += 1
        return [[259] * bool(text and not continuation) + [byte + 3 for byte in text.encode()] for text in texts]

    def decode(self, ids):
        return bytes(i - 3 for i in ids if 3 <= i < 259).decode()

    def save(self, directory):
        raise NotImplementedError


@pytest.fixture
def tokenizer() -> Bytes:
    return Bytes()


@pytest.fixture
def other_tokenizer() -> Bytes:
    return Bytes(name="other")


@pytest.fixture
def bare_tokenizer() -> Bytes:
    return Bytes(add_bos=False)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, object], Path]:
    """Puts a text as it is, anything else as JSON (a line each for .jsonl), under a name."""

    def put(name: str, content: object) -> Path:
        path = tmp_path / name
        if not isinstance(content, str | bytes):
            lines = "\n".join(json.dumps(record) for record in content) if name.endswith(".jsonl") else None
            content = json.dumps(content) if lines is None else lines
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return put


@pytest.fixture
def corpus_of(write, tokenizer) -> Callable[[list[int]], Corpus]:
    """A corpus whose document i has an answer of `sizes[i]` bytes."""

    def build(sizes: list[int]) -> Corpus:
        records = [{"instruction": f"{i:03}", "output": "x" * size} for i, size in enumerate(sizes)]
        return build_corpus(write("corpus.json", records), tokenizer, max_words=4096)

    return build
