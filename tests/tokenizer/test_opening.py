import pytest

from accessory.errors import TokenizerError
from accessory.tokenizer import holds_tokenizer, open_tokenizer
from accessory.tokenizer.hf_json import JsonTokenizer
from accessory.tokenizer.spm import SentencePieceTokenizer

CONFIG = '{"eos_token": "</s>"}'


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"tokenizer.model"}, SentencePieceTokenizer),
        ({"tokenizer.model", "tokenizer.json"}, SentencePieceTokenizer),
        ({"tokenizer.model", "tokenizer.json", "tokenizer_config.json"}, JsonTokenizer),
        ({"tokenizer.json", "tokenizer_config.json"}, JsonTokenizer),
        ({"tokenizer.json", "special_tokens_map.json"}, JsonTokenizer),
        ({"tokenizer.model", "tokenizer_config.json"}, SentencePieceTokenizer),
    ],
)
def test_which_file_of_a_directory_is_read(tmp_path, spm_model, llama_like, files, kind):
    contents = {"tokenizer.model": spm_model, "tokenizer.json": llama_like.to_str().encode()}
    for name in files:
        (tmp_path / name).write_bytes(contents.get(name, CONFIG.encode()))
    assert type(open_tokenizer(tmp_path)) is kind
    assert type(open_tokenizer(str(tmp_path))) is kind


def test_a_file_and_its_directory_give_the_same(tmp_path, spm_model):
    (tmp_path / "tokenizer.model").write_bytes(spm_model)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert open_tokenizer(tmp_path / "tokenizer.model").fingerprint == open_tokenizer(tmp_path).fingerprint


@pytest.mark.parametrize(("name", "words"), [("absent.model", "no such file"), ("", "found neither tokenizer.json")])
def test_missing_files_are_named(tmp_path, name, words):
    with pytest.raises(TokenizerError, match=words) as caught:
        open_tokenizer(tmp_path / name)
    assert str(tmp_path) in str(caught.value)


def test_another_suffix_is_refused(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("a\nb\n")
    with pytest.raises(TokenizerError, match=r"vocab.txt: found a text file of 4 bytes named '.txt'; expected"):
        open_tokenizer(path)


def test_several_gguf_files_are_listed(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(TokenizerError, match=r"several .gguf files \(a.gguf, b.gguf\)"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer.model"}, True),
        ({"tokenizer.json"}, True),
        ({"vocab.json", "merges.txt"}, True),
        ({"vocab.json"}, False),
        ({"v.gguf"}, False),
        (set(), False),
    ],
)
def test_whether_a_directory_holds_a_tokenizer(tmp_path, files, expected):
    for name in files:
        (tmp_path / name).touch()
    assert holds_tokenizer(tmp_path) is expected
