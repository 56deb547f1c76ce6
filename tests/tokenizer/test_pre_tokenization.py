import json
import unicodedata

import gguf
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from accessory.tokenizer import open_tokenizer
from accessory.tokenizer.pre_tokenization import PRE_TOKENIZATIONS
from tests.texts import mixed_texts

SPECIAL = ["<|end|>", "[gMASK]", "<sop>"]
OTHERWISE = {"tekken": ("Mn", "Mc", "Me"), "deepseek-coder": ("Zl",)}
"""Kinds of characters: combining marks, and the line separator, which is no blank to the `tokenizers` library there."""


@pytest.fixture(scope="module")
def model():
    """Tokens and merges of a BPE learned across all cuts, so that every cut shows in the ids."""
    pipeline = Tokenizer(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    pipeline.train_from_iterator(mixed_texts(2000, seed=1), trainer)
    learned = json.loads(pipeline.to_str())["model"]
    return sorted(learned["vocab"], key=learned["vocab"].get), learned["merges"]


@pytest.mark.parametrize("pre", PRE_TOKENIZATIONS)
def test_every_way_is_llama_cpps(model, llama_cpp, tmp_path, pre):
    """Except that llama.cpp does not compose characters, and sorts some of them into other kinds in two ways."""
    tokens, merges = model
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    texts = mixed_texts(300)
    otherwise = OTHERWISE.get(pre, ())
    texts = [text for text in texts if not any(unicodedata.category(letter) in otherwise for letter in text)]
    composed = [unicodedata.normalize("NFC", text) if PRE_TOKENIZATIONS[pre].composes else text for text in texts]
    found = llama_cpp.ask(tmp_path / "v.gguf", texts=composed)
    ours = open_tokenizer(tmp_path / "v.gguf")
    assert ours.encode_batch(texts) == found["texts"]
    if not PRE_TOKENIZATIONS[pre].start_tokens:  # GLM's own, of which llama.cpp knows nothing
        assert list(ours.start_ids) == found["opening"]
