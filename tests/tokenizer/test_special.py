import json

import pytest

from accessory.errors import TokenizerError
from accessory.tokenizer.special import Added, SpecialTokens, read_special_tokens, write_special_tokens


def put(directory, **files):
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


def test_no_files_state_nothing(tmp_path):
    assert read_special_tokens(tmp_path) == SpecialTokens()


def test_names_are_strings_or_objects(tmp_path):
    put(tmp_path, tokenizer_config={"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"})
    found = read_special_tokens(tmp_path)
    assert (found.bos, found.eos, found.add_bos, found.no_bos) == ("<s>", "</s>", None, False)


def test_the_first_file_that_speaks_is_right(tmp_path):
    put(tmp_path, tokenizer_config={"eos_token": "a"}, special_tokens_map={"eos_token": "b", "bos_token": "c"})
    put(tmp_path, generation_config={"eos_token_id": [7, 8]}, config={"eos_token_id": 9, "bos_token_id": 1})
    found = read_special_tokens(tmp_path)
    assert (found.bos, found.eos, found.bos_id, found.eos_id) == ("c", "a", 1, 7)


def test_a_null_bos_is_a_statement(tmp_path):
    put(tmp_path, tokenizer_config={"bos_token": None, "add_bos_token": False}, config={"bos_token_id": 5})
    found = read_special_tokens(tmp_path)
    assert found.no_bos and found.add_bos is False


def test_writing_and_reading_again(tmp_path):
    config = {"chat_template": "{{ x }}", "eos_token": "old"}
    added = {7: Added("<a>"), 9: Added("b", special=False, lstrip=True, rstrip=True)}
    write_special_tokens(tmp_path, config, bos=None, eos="é", add_bos=False, stop_ids=(5, 3), added=added)
    found = read_special_tokens(tmp_path)
    assert found.added == added and found.stop_ids == (5, 3) and found.eos_id == 5
    assert found.no_bos and found.eos == "é" and found.add_bos is False
    assert found.config["chat_template"] == "{{ x }}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"eos_token": 3}', "'eos_token' is 3"),
        ('{"add_bos_token": "yes"}', "'add_bos_token' is 'yes'"),
        ("[1]", "holds a list; expected a JSON object"),
        ('{"eos', "expected a JSON object"),
        ("<html>", "an HTML page"),
    ],
)
def test_faults_name_file_and_key(tmp_path, content, words):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(TokenizerError, match=words) as caught:
        read_special_tokens(tmp_path)
    assert "tokenizer_config.json" in str(caught.value)


@pytest.mark.parametrize("value", [True, "2", [[1]]])
def test_ids_are_numbers(tmp_path, value):
    put(tmp_path, config={"eos_token_id": value})
    with pytest.raises(TokenizerError, match="expected a token id"):
        read_special_tokens(tmp_path)


def test_added_tokens_of_both_files_the_configuration_saying_more(tmp_path):
    put(tmp_path, added_tokens={"<a>": 5, "<b>": 6}, special_tokens_map={"pad_token": "<a>"})
    put(
        tmp_path, tokenizer_config={"added_tokens_decoder": {"6": {"content": "<b>", "special": False, "rstrip": True}}}
    )
    assert read_special_tokens(tmp_path).added == {5: Added("<a>"), 6: Added("<b>", special=False, rstrip=True)}


def test_names_without_ids_are_gathered_once(tmp_path):
    put(tmp_path, tokenizer_config={"eos_token": "</s>", "pad_token": {"content": "<pad>"}, "unk_token": "</s>"})
    put(tmp_path, special_tokens_map={"additional_special_tokens": ["<x>", {"content": "<y>"}], "bos_token": "<s>"})
    assert read_special_tokens(tmp_path).named == ("<s>", "</s>", "<pad>", "<x>", "<y>")


def test_the_template_file_takes_precedence(tmp_path):
    put(tmp_path, tokenizer_config={"chat_template": "old"})
    (tmp_path / "chat_template.jinja").write_text("new é", encoding="utf-8-sig")
    assert read_special_tokens(tmp_path).config == {"chat_template": "new é"}
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\x00")
    with pytest.raises(TokenizerError, match=r"chat_template.jinja: found a binary file.*expected a Jinja template"):
        read_special_tokens(tmp_path)


def test_what_generation_config_says_else_is_kept(tmp_path):
    put(tmp_path, generation_config={"temperature": 1, "eos_token_id": 4})
    write_special_tokens(tmp_path, {}, bos=None, eos="e", add_bos=False, stop_ids=(3, 5))
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"temperature": 1, "eos_token_id": [3, 5]}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"added_tokens": {"<a>": "5"}}, r"added_tokens.json: '<a>' is '5'; expected an id"),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, None),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "'added_tokens_decoder' is a list; expected an object"),
        ({"tokenizer_config": {"added_tokens_decoder": {"-1": {"content": "a"}}}}, "has the key '-1'; expected ids"),
        ({"tokenizer_config": {"added_tokens_decoder": {"5": {"content": ""}}}}, "token 5 of .* expected 'content'"),
        ({"special_tokens_map": {"additional_special_tokens": "<a>"}}, "expected a list of tokens"),
    ],
)
def test_faults_of_added_tokens_are_named(tmp_path, files, words):
    put(tmp_path, **files)
    if words is None:
        assert read_special_tokens(tmp_path).added == {}
    else:
        with pytest.raises(TokenizerError, match=words):
            read_special_tokens(tmp_path)
