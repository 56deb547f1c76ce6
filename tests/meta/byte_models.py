"""Tiny random models whose tokens are bytes."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch

BYTES = 256
VOCABULARY = BYTES + 2  # every byte, then <s> and </s>
BOS, EOS = BYTES, BYTES + 1
TINY = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15,
}  # fmt: skip
CHATML = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def write_tokenizer(directory: Path) -> None:
    """A tokenizer.json of single bytes with <s> and </s>, and the file that names them."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(special))


def random_ids(*lengths: int) -> torch.Tensor:
    """Ids of packed documents."""
    return torch.randint(0, BYTES, (sum(lengths),), generator=torch.Generator().manual_seed(1))
