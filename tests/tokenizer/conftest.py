"""Tiny vocabularies, made on the spot by the libraries that define their formats."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

SENTENCES = [
    "Below is an instruction that describes a task.",
    "Write a response that appropriately completes the request.",
    "The quick brown fox jumps over the lazy dog, 1234567890 times!",
    "Don't we'll they're I'm you've he'd; naïve café, Übergröße.",
    "def add(a, b):\n    return a + b\n",
    "### Instruction:\nList three colors.\n\n### Response:\nred, green, blue",
] * 20

AWKWARD = [
    "",
    " ",
    "Hello world",
    " leading and trailing ",
    "two  spaces   three\n\n\tlines\r\n",
    "12345 1,234.5 in 1999  2000",
    "naïve 日本語 🙂 é",
    "</s><s><|im_end|>[INST] <unk>",
]


def _train(**settings: object) -> bytes:
    """A serialized BPE model of 420 pieces with byte fallback, normalizing nothing, as LLaMA's does."""
    model = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 1.0,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, **{**defaults, **settings}
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def train_sentencepiece() -> Callable[..., bytes]:
    return _train


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    return SENTENCES[:6]


@pytest.fixture(scope="session")
def awkward() -> list[str]:
    """Texts that tokenizers disagree over; the last one spells control tokens."""
    return AWKWARD


@pytest.fixture(scope="session")
def spm_model() -> bytes:
    return _train(user_defined_symbols=["<|im_end|>", "<tag>"])


@pytest.fixture
def spm_file(spm_model: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(spm_model)
    return path


@pytest.fixture(scope="session")
def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE pipeline, GPT-2's cutting, with ChatML's markers."""
    pipeline = tokenizers.Tokenizer(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pipeline.train_from_iterator(SENTENCES, trainer)
    return pipeline


@pytest.fixture(scope="session")
def llama_like() -> tokenizers.Tokenizer:
    """A pipeline that makes up a leading space, as the tokenizer.json of Llama 2 does."""
    pipeline = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    pipeline.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pipeline.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=pieces, show_progress=False)
    pipeline.train_from_iterator([word for line in SENTENCES for word in line.split(" ")], trainer)
    return pipeline
