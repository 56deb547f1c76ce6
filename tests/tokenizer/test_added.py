import json

import pytest

from accessory.errors import TokenizerError
from accessory.tokenizer import open_tokenizer, with_added_tokens

NEW = ["<tok>", "[one more]"]


@pytest.fixture(params=["json", "sentencepiece", "chatglm"])
def tokenizer(request, tmp_path, byte_level, spm_model):
    config = {"eos_token": "</s>"}
    if request.param == "json":
        (tmp_path / "tokenizer.json").write_text(byte_level.to_str(), encoding="utf-8")
        config = {"eos_token": "<|im_end|>"}
    else:
        (tmp_path / "tokenizer.model").write_bytes(spm_model)
        if request.param == "chatglm":
            config["tokenizer_class"] = "ChatGLMTokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return open_tokenizer(tmp_path)


def test_they_have_the_next_ids_and_no_text(tokenizer, sentences):
    first, ours = tokenizer.vocab_size, with_added_tokens(tokenizer, NEW)
    assert ours.vocab_size == first + 2 and ours.decode([first, first + 1]) == ""
    assert [ours.control_tokens()[first + place].content for place in (0, 1)] == NEW
    for text in [*sentences, "a<tok>b[one more]"]:
        assert ours.encode(text) == tokenizer.encode(text)
    assert (ours.eos_id, ours.opening, ours.stop_ids) == (tokenizer.eos_id, tokenizer.opening, tokenizer.stop_ids)
    assert ours.fingerprint != tokenizer.fingerprint


def test_saved_and_opened_again_they_are_there(tokenizer, tmp_path):
    ours = with_added_tokens(with_added_tokens(tokenizer, NEW[:1]), NEW[1:])
    assert ours.fingerprint == with_added_tokens(tokenizer, NEW).fingerprint
    ours.save(tmp_path / "saved")
    again = open_tokenizer(tmp_path / "saved")
    assert again.fingerprint == ours.fingerprint and again.control_tokens() == ours.control_tokens()


def test_those_that_are_there_already_keep_their_ids(tokenizer):
    ours = with_added_tokens(tokenizer, NEW)
    assert with_added_tokens(ours, ["[one more]", "<tok>"]).fingerprint == ours.fingerprint
    assert with_added_tokens(tokenizer, [*NEW, *NEW]).fingerprint == ours.fingerprint
    assert with_added_tokens(tokenizer, []).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("token", ["", " ", None])
def test_blank_tokens_are_refused(tokenizer, token):
    with pytest.raises(TokenizerError, match="expected a text that is not blank"):
        with_added_tokens(tokenizer, [token])


def test_an_ordinary_token_is_refused(tokenizer):
    with pytest.raises(TokenizerError, match="'e' is an ordinary token"):
        with_added_tokens(tokenizer, ["e"])
