import json

import pytest
from transformers import AutoTokenizer

from accessory.errors import TokenizerError
from accessory.tokenizer import open_tokenizer

OPT = {
    "tokenizer_class": "GPT2Tokenizer",
    "add_bos_token": True,
    "add_prefix_space": False,
    "bos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False},
    "eos_token": "</s>",
    "unk_token": "</s>",
    "pad_token": "<pad>",
}
QWEN = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|endoftext|>", "add_bos_token": False}


@pytest.fixture
def lay(byte_level, tmp_path):
    """Writes the two files, OPT's special tokens first, with files beside them."""

    def put(config, **beside):
        model = json.loads(byte_level.to_str())["model"]
        first = ["<s>", "<pad>", "</s>"]
        tokens = first + sorted(model["vocab"], key=model["vocab"].get)
        (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
        merges = "\n".join(" ".join(merge) for merge in model["merges"])
        (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
        for name, content in {"tokenizer_config": config, **beside}.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return put


@pytest.mark.parametrize("config", [OPT, QWEN, {**OPT, "add_prefix_space": True}])
def test_ids_are_those_of_transformers(lay, config, awkward, sentences):
    directory = lay(config)
    ours, theirs = open_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    texts = [text for text in awkward + sentences if "<" not in text] + ["cafe\u0301"]
    assert [ours.encode(text) for text in texts] == [theirs(text, add_special_tokens=False).input_ids for text in texts]
    for text in texts[2:]:
        assert [*ours.start_ids, *ours.encode(text)] == theirs(text).input_ids
    assert (ours.eos_id, ours.vocab_size) == (theirs.eos_token_id, len(theirs))


def test_a_byte_order_mark_is_no_merge(lay):
    directory = lay(OPT)
    plain = open_tokenizer(directory).fingerprint
    for name in ("vocab.json", "merges.txt"):
        (directory / name).write_bytes(b"\xef\xbb\xbf" + (directory / name).read_bytes())
    assert open_tokenizer(directory).fingerprint == plain


def test_a_document_of_opt_opens_with_its_end_token(lay):
    ours = open_tokenizer(lay(OPT))
    assert ours.start_ids == (2,) == (ours.bos_id,) == (ours.eos_id,)
    assert 2 not in ours.encode("a</s>") and ours.decode([2, *ours.encode("a</s>"), 1]) == "a</s>"


def test_added_tokens_of_every_file_have_the_ids_of_transformers(lay):
    decoder = {"404": {"content": "<tool>", "special": False}, "403": {"content": "<new>", "special": True}}
    directory = lay(
        {**QWEN, "added_tokens_decoder": decoder, "pad_token": "[PAD]"},
        special_tokens_map={"additional_special_tokens": ["<|im_end|>", "<more>"]},
    )
    ours, theirs = open_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert ours.vocab_size == 407
    assert ours.encode("a<tool>b") == theirs("a<tool>b", add_special_tokens=False).input_ids
    assert ours.control_tokens()[403].content == "<new>" and theirs.convert_tokens_to_ids("<new>") == 403
    for name in ("[PAD]", "<more>"):
        assert next(i for i, token in ours.control_tokens().items() if token.content == name) >= 405
    assert not {403, 405, 406} & set(ours.encode("<new>[PAD]<more>"))
    assert ours.decode([403, 405, 406]) == ""


def test_of_added_tokens_json_the_named_ones_are_special(lay, tmp_path):
    """As for transformers; others are found in texts, but for those spelled like control tokens."""
    added = {"<x>": 403, "<y>": 404, "<|z|>": 405}
    directory = lay(QWEN, added_tokens=added, special_tokens_map={"pad_token": "<y>"})
    ours, theirs = open_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert ours.vocab_size == 406 == len(theirs) and theirs.convert_tokens_to_ids([*added]) == [*added.values()]
    assert ours.encode("a<x>b") == theirs("a<x>b").input_ids and 403 in ours.encode("a<x>b")
    assert not {404, 405} & {*ours.encode("<y><|z|>")} and ours.decode([404, 405]) == ""
    ours.save(tmp_path / "saved")
    assert open_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").pad_token_id == 404


def test_without_a_class_it_is_gpt2s_and_ends_usually(lay, byte_level):
    ours = open_tokenizer(lay({}))
    assert ours.eos_id == 3 and ours.start_ids == ()
    assert ours.encode("Hello world 12") == [i + 3 for i in byte_level.encode("Hello world 12").ids]


def test_saved_as_json_it_is_equal(lay, tmp_path):
    ours = open_tokenizer(lay(OPT, generation_config={"eos_token_id": [2, 5]}))
    ours.save(tmp_path / "saved")
    again = open_tokenizer(tmp_path / "saved")
    assert again.fingerprint == ours.fingerprint and again.start_ids == (2,) and again.stop_ids == {2, 5}


def test_either_file_stands_for_both(lay):
    directory = lay(OPT)
    prints = {open_tokenizer(directory / name).fingerprint for name in ("vocab.json", "merges.txt")}
    assert prints == {open_tokenizer(directory).fingerprint}


def test_an_added_token_elsewhere_than_at_the_end_is_refused(lay):
    decoder = {"900": {"content": "<new>", "special": True}}
    with pytest.raises(TokenizerError, match=r"'<new>' the id 900, where this vocabulary has 403"):
        open_tokenizer(lay({**QWEN, "added_tokens_decoder": decoder}))


def test_another_class_is_refused(lay):
    with pytest.raises(TokenizerError, match=r"'RobertaTokenizer'; expected one of GPT2Tokenizer"):
        open_tokenizer(lay({"tokenizer_class": "RobertaTokenizer"}))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("vocab.json", '{"a": "b"}', "each with its own id"),
        ("vocab.json", '{"a": 1, "b": 1}', "each with its own id"),
        ("vocab.json", "{}", "each with its own id"),
        ("vocab.json", "[1]", "expected a JSON object"),
        ("merges.txt", "q zz\n", "merge 'q zz' does not fit"),
        ("merges.txt", "a b c\n", "merge 'a b c' does not fit"),
        ("merges.txt", b"\xff\xfe", "expected merges"),
    ],
)
def test_files_that_do_not_fit_are_named(lay, name, content, words):
    path = lay(OPT) / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TokenizerError, match=words) as caught:
        open_tokenizer(path.parent)
    assert str(path) in str(caught.value)
