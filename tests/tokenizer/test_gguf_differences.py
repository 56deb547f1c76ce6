import json

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers

from accessory.tokenizer import open_tokenizer
from accessory.tokenizer.gguf_differences import differences

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
