import json

import gguf
import pytest
from transformers import AutoTokenizer

from accessory.errors import TokenizerError
from accessory.tokenizer import Chat, open_tokenizer
from accessory.tokenizer.gguf_fields import add_fields, vocabulary_fields
from accessory.tokenizer.transformers_files import save_for_transformers

NEW = ["<tok>", "[one more]", "<|call|>"]


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


def test_they_have_the_next_ids_and_text_becomes_them(tokenizer, sentences):
    first, ours = tokenizer.vocab_size, tokenizer.with_added_tokens(NEW)
    assert ours.vocab_size == first + len(NEW)
    for place, token in enumerate(NEW):
        assert ours.added_tokens()[first + place].content == token
        assert ours.encode(f"a{token}b").count(first + place) == 1
        assert [i for i in ours.encode(f"{token} {token}", continuation=True) if i >= first] == [first + place] * 2
        assert ours.decode(ours.encode(f"red{token}green", continuation=True)) == f"red{token}green"
    for text in sentences:
        assert ours.encode(text) == tokenizer.encode(text)
    assert (ours.eos_id, ours.start_ids, ours.stop_ids) == (tokenizer.eos_id, tokenizer.start_ids, tokenizer.stop_ids)
    assert ours.fingerprint != tokenizer.fingerprint
    assert ours.control_tokens() == tokenizer.control_tokens()


def test_control_tokens_that_a_text_spells_stay_text(tokenizer):
    ours = tokenizer.with_added_tokens(NEW)
    for token in ours.control_tokens().values():
        assert not ours.control_tokens().keys() & set(ours.encode(f"a{token.content}<tok>b"))


def test_saved_and_opened_again_they_are_there(tokenizer, tmp_path, sentences):
    ours = tokenizer.with_added_tokens(NEW[:1]).with_added_tokens(NEW[1:])
    assert ours.fingerprint == tokenizer.with_added_tokens(NEW).fingerprint
    ours.save(tmp_path / "saved")
    again = open_tokenizer(tmp_path / "saved")
    assert again.fingerprint == ours.fingerprint and again.added_tokens() == ours.added_tokens()
    for text in [*sentences, "".join(NEW), f" {NEW[-1]} x"]:
        for continuation in (False, True):
            assert again.encode(text, continuation=continuation) == ours.encode(text, continuation=continuation)


def test_transformers_gives_their_ids_too(tokenizer, tmp_path):
    ours = tokenizer.with_added_tokens(NEW)
    save_for_transformers(ours, tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for token in NEW:
        text = f"red {token} green{token}"
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)


def test_llama_cpp_gives_their_ids_too(tokenizer, llama_cpp, tmp_path, sentences):
    """Except tokens that llama.cpp takes for control tokens by their spelling, whatever the file says."""
    new = [*NEW[:2], "two  blanks"]
    ours = tokenizer.with_added_tokens(new)
    texts = [*sentences, *(text.replace(" ", token) for text in sentences for token in (*new, " <tok> "))]
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    add_fields(writer, vocabulary_fields(ours, ours.vocab_size))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ids = ours.encode_batch(texts)
    assert llama_cpp.ask(tmp_path / "v.gguf", texts=texts)["texts"] == ids
    assert open_tokenizer(tmp_path / "v.gguf").encode_batch(texts) == ids


def test_chat_prompts_hold_them(byte_level, tmp_path):
    """In what a user asks, in what is answered, and in the words of the template."""
    template = "{% for m in messages %}<tok>{{ m.content }}<|im_end|>{% endfor %}"
    (tmp_path / "tokenizer.json").write_text(byte_level.to_str(), encoding="utf-8")
    config = {"eos_token": "<|im_end|>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = open_tokenizer(tmp_path).with_added_tokens(NEW)
    tok, call = (next(i for i, t in ours.added_tokens().items() if t.content == name) for name in ("<tok>", "<|call|>"))
    messages = [{"role": "user", "content": "a<tok>"}, {"role": "assistant", "content": "<|call|><|im_end|>"}]
    ((asked, said),) = Chat(ours).documents(messages)
    assert asked == (Chat(ours).ids(messages[:1]), False) and asked[0].count(tok) == 2
    assert (said[0].count(tok), said[0].count(call), said[0].count(ours.eos_id)) == (1, 1, 1)


def test_those_that_are_there_already_keep_their_ids(tokenizer):
    ours = tokenizer.with_added_tokens(NEW)
    assert ours.with_added_tokens(["[one more]", "<tok>"]).fingerprint == ours.fingerprint
    assert tokenizer.with_added_tokens([*NEW, *NEW]).fingerprint == ours.fingerprint
    assert tokenizer.with_added_tokens([]).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("token", ["", " ", None])
def test_blank_tokens_are_refused(tokenizer, token):
    with pytest.raises(TokenizerError, match="expected a text that is not blank"):
        tokenizer.with_added_tokens([token])


def test_an_ordinary_token_is_refused(tokenizer):
    with pytest.raises(TokenizerError, match="'e' is an ordinary token"):
        tokenizer.with_added_tokens(["e"])


def test_what_follows_one_is_part_of_what_defines_a_tokenizer(spm_model, tmp_path):
    """`legacy` decides whether a blank follows it, and so changes documents; the fingerprint must tell."""
    (tmp_path / "tokenizer.model").write_bytes(spm_model)
    made = []
    for legacy in (True, False):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
        made.append(open_tokenizer(tmp_path).with_added_tokens(["<tok>"]))
    assert made[0].encode("<tok>red") != made[1].encode("<tok>red")
    assert made[0].fingerprint != made[1].fingerprint
