import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers

from accessory.tokenizer import open_tokenizer
from accessory.tokenizer.gguf_differences import differences
from accessory.tokenizer.pre_tokenization import PRE_TOKENIZATIONS
from tests.tokenizer.gguf_files import write_byte_level

CHATML = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def lay(directory, name, content, **config):
    (directory / name).write_bytes(content)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return open_tokenizer(directory)


def test_what_a_byte_level_vocabulary_loses(byte_level, tmp_path):
    pipeline = Tokenizer.from_str(byte_level.to_str())
    assert differences(lay(tmp_path, "tokenizer.json", pipeline.to_str().encode(), **CHATML)) == []
    pipeline.normalizer = normalizers.NFC()
    pipeline.add_tokens([AddedToken("<|end|>", special=True, rstrip=True)])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5, 6, 7]}')
    assert differences(lay(tmp_path, "tokenizer.json", pipeline.to_str().encode(), **CHATML)) == [
        "does not compose characters (NFC) before it cuts a text",
        "keeps blanks beside <|end|>, where training drops them",
        "does not end an answer at the ids 7",
    ]


def test_words_that_llama_cpp_cuts_otherwise(llama_cpp, tmp_path):
    """Its tekken has no words with combining marks, and no capitals but A to Z, in the middle of a word too."""
    texts = ["x\u0301y", "éÉ", "ÀB", "Éa Zürich"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {name: number for number, name in enumerate(["<|pad|>", "<s>", "</s>", *letters])}
    whole = [pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text)[0][0] for text in texts]
    merges = []
    for word in whole:
        for end in range(1, len(word)):
            names.setdefault(word[: end + 1], len(names))
            merges.append((word[:end], word[end]))
    pipeline = PRE_TOKENIZATIONS["tekken"].pipeline(names, list(dict.fromkeys(merges)))
    pipeline.add_special_tokens(["<s>", "</s>"])
    pipeline.decoder = decoders.ByteLevel()
    tokenizer = lay(tmp_path, "tokenizer.json", pipeline.to_str().encode(), bos_token="<s>", eos_token="</s>")
    (said,) = differences(tokenizer)
    assert said == "cuts words otherwise at combining marks, and at capitals beyond A to Z"
    found = llama_cpp.ask(write_byte_level(tmp_path / "v.gguf", pipeline, "tekken"), texts=texts)["texts"]
    same = [one == other for one, other in zip(tokenizer.encode_batch(texts), found, strict=True)]
    assert same == [False, False, False, True]


@pytest.mark.parametrize(
    ("settings", "config", "expected"),
    [
        ({}, {}, []),
        ({}, {"legacy": False}, ["puts a blank before text that follows a control or added token"]),
        ({"add_dummy_prefix": False}, {"legacy": False}, []),
        (
            {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
            {},
            ["does not normalize text", "keeps all of several blanks in a row"],
        ),
    ],
)
def test_what_a_sentencepiece_model_loses(train_sentencepiece, tmp_path, settings, config, expected):
    assert differences(lay(tmp_path, "tokenizer.model", train_sentencepiece(**settings), **config)) == expected
