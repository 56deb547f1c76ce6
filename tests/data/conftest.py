"""A vocabulary of bytes, data files and corpora, all made on the spot."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Pipeline
from tokenizers import decoders, models, pre_tokenizers

from accessory.data.corpus import Corpus, build_corpus
from accessory.tokenizer import Tokenizer, open_tokenizer


class Bytes(Tokenizer):
    """UTF-8 bytes from id 3 on, so that every id in a test can be worked out by hand.

    A text that continues nothing opens with id 259, as a made-up leading space would; an empty text has no ids.
    """

    def __init__(self, *, add_bos: bool = True, name: str = "bytes") -> None:
        self.vocab_size, self.bos_id, self.eos_id = 260, 1, 2
        self.start_ids, self.stop_ids = (1,) if add_bos else (), frozenset({2})
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


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def chat_tokenizer(tmp_path: Path) -> Callable[..., Tokenizer]:
    """A byte-level vocabulary without merges, and a chat template: `<|im_start|>` is 256, `<|im_end|>` 257, EOS 258."""

    def build(chat_template: str | None = CHATML) -> Tokenizer:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        pipeline = Pipeline(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
        pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        pipeline.decoder = decoders.ByteLevel()
        pipeline.add_special_tokens(["<|im_start|>", "<|im_end|>", "<eos>"])
        directory = tmp_path / "tokenizer"
        directory.mkdir(exist_ok=True)
        pipeline.save(str(directory / "tokenizer.json"))
        config = {"eos_token": "<eos>", "chat_template": chat_template}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        return open_tokenizer(directory)

    return build


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
