import json

import pytest

from accessory.errors import TokenizerError
from accessory.tokenizer.special import SpecialTokens, read_special_tokens, write_special_tokens


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
    write_special_tokens(tmp_path, {"chat_template": "{{ x }}", "eos_token": "old"}, bos=None, eos="é", add_bos=False)
    found = read_special_tokens(tmp_path)
    assert found.no_bos and found.eos == "é" and found.add_bos is False
    assert found.config["chat_template"] == "{{ x }}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"eos_token": 3}', "'eos_token' is 3"),
        ('{"add_bos_token": "yes"}', "'add_bos_token' is 'yes'"),
        ("[1]", "found a JSON list"),
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
