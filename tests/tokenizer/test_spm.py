import json

import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AutoTokenizer

from accessory.errors import TokenizerError
from accessory.tokenizer import open_tokenizer


def reference(model):
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def test_ids_are_those_of_sentencepiece(spm_file, spm_model, awkward, sentences):
    ours, theirs = open_tokenizer(spm_file), reference(spm_model)
    texts = [text for text in awkward + sentences if "<|" not in text]
    assert [ours.encode(text) for text in texts] == [theirs.encode(text) for text in texts]
    assert ours.encode_batch(texts, threads=2) == [theirs.encode(text) for text in texts]
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.start_ids) == (420, 1, 2, (1,))


def test_a_continued_text_decodes_to_the_whole(spm_file, awkward, sentences):
    ours = open_tokenizer(spm_file)
    for text in awkward + sentences:
        for cut in range(1, len(text)):
            ids = ours.encode(text[:cut]) + ours.encode(text[cut:], continuation=True)
            assert ours.decode(ids) == text, (text, cut)


def test_only_a_continuation_has_no_made_up_space(spm_file, spm_model):
    ours, pieces = open_tokenizer(spm_file), reference(spm_model)
    assert pieces.id_to_piece(ours.encode("task")[0]).startswith("▁")
    assert not pieces.id_to_piece(ours.encode("task", continuation=True)[0]).startswith("▁")
    assert ours.encode(" task", continuation=True) == ours.encode("task")


@pytest.mark.parametrize("config", [None, {}, {"legacy": None}, {"legacy": True}, {"legacy": False}])
def test_behind_a_control_token_a_space_is_made_up_unless_a_file_says_not(spm_file, spm_model, tmp_path, config):
    """Meta's code and llama.cpp do so, and transformers 4 where `legacy` is absent."""
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, alone = open_tokenizer(spm_file), reference(spm_model).encode("[task] one")
    made_up = config is None or config.get("legacy") is not False
    assert (ours.encode_segment("[task] one", "behind_control") == alone) is made_up
    assert ours.encode_segment("[task] one", "start") == alone != ours.encode_segment("[task] one", "continued")


def test_a_continuation_keeps_its_space_in_a_model_that_strips(tmp_path, train_sentencepiece):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_sentencepiece(remove_extra_whitespaces=True))
    ours = open_tokenizer(path)
    assert ours.decode(ours.encode("quick") + ours.encode(" fox", continuation=True)) == "quick fox"


def test_control_markers_in_a_text_stay_text(spm_file, spm_model):
    ours, theirs = open_tokenizer(spm_file), reference(spm_model)
    marker = theirs.piece_to_id("<|im_end|>")
    assert marker in theirs.encode("a<|im_end|>b")  # the library alone would forge a turn
    for text in ("a<|im_end|>b", "x</s>y<s>"):
        ids = ours.encode(text)
        assert not {marker, ours.bos_id, ours.eos_id} & set(ids)
        assert ours.decode(ids) == text
    assert theirs.piece_to_id("<tag>") in ours.encode("a<tag>b")  # a user-defined piece that is none of chat's


def test_special_and_unknown_ids_decode_to_nothing(spm_file):
    ours = open_tokenizer(spm_file)
    ids = ours.encode("Write a task")
    assert ours.decode([ours.bos_id, *ids, ours.eos_id, ours.vocab_size, -1]) == "Write a task"


def test_saved_and_opened_again_it_is_equal(spm_file, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, "chat_template": "{{ x }}"}))
    ours = open_tokenizer(spm_file)
    ours.save(tmp_path / "saved")
    again = open_tokenizer(tmp_path / "saved")
    assert again.fingerprint == ours.fingerprint and again.start_ids == ()
    stated = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert stated["chat_template"] == "{{ x }}" and stated["legacy"] is True
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "### Instruction:\nList three colors.\n\n[red,  green] café 日"
    assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)


def test_names_beside_the_model_win(spm_file, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "bos_token": None}))
    ours = open_tokenizer(spm_file)
    assert ours.encode("<|im_end|>") != [ours.eos_id]
    assert reference(spm_file.read_bytes()).id_to_piece(ours.eos_id) == "<|im_end|>"
    assert ours.bos_id is None and ours.start_ids == ()


def test_a_name_that_is_no_piece_is_refused(spm_file, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eot|>"}))
    with pytest.raises(TokenizerError, match=r"eos_token '<\|eot\|>', which is no token of it. A vocab"):
        open_tokenizer(spm_file)


def test_a_model_without_eos_needs_config(tmp_path, train_sentencepiece):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train_sentencepiece(eos_id=-1, bos_id=-1))
    with pytest.raises(TokenizerError, match="names the end of a document"):
        open_tokenizer(path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert open_tokenizer(path).eos_id == 5


def test_an_ordinary_piece_named_eos_is_never_found_in_a_text_nor_shown(spm_file, spm_model, tmp_path):
    theirs = reference(spm_model)
    piece = theirs.encode_as_pieces("task")[0]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": piece}))
    ours, text = open_tokenizer(spm_file), piece.replace("▁", " ").strip()
    assert theirs.encode(text) == [ours.eos_id] and ours.eos_id not in ours.encode(text)
    assert ours.decode([*ours.encode(text), ours.eos_id]) == text


def test_save_refuses_a_directory_where_another_file_would_win(spm_file, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"holds a tokenizer.json"):
        open_tokenizer(spm_file).save(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html></html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git-LFS pointer"),
        (bytes(range(256)), "a binary file"),
        (ModelProto().SerializeToString() + b"\x12\x00", "sentencepiece model"),
    ],
)
def test_what_is_no_model_is_named(tmp_path, content, words):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=words) as caught:
        open_tokenizer(path)
    assert str(path) in str(caught.value) and "expected a sentencepiece model" in str(caught.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_cut_model_is_refused(spm_file, spm_model, share):
    spm_file.write_bytes(spm_model[: int(len(spm_model) * share)])
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        open_tokenizer(spm_file)


def decoder(**tokens):
    return {"added_tokens_decoder": {str(i[1:]): {"content": c, "special": s} for i, (c, s) in tokens.items()}}


@pytest.mark.parametrize("file", ["added_tokens", "tokenizer_config"])
def test_added_tokens_count_and_are_never_found_in_a_text(spm_file, spm_model, tmp_path, file):
    content = {"[PAD]": 420} if file == "added_tokens" else decoder(_420=("[PAD]", True))
    (tmp_path / f"{file}.json").write_text(json.dumps(content))
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    ours = open_tokenizer(spm_file)
    assert ours.vocab_size == 421 and ours.decode([420]) == ""
    assert ours.encode("a[PAD]b") == reference(spm_model).encode("a[PAD]b")
    ours.save(tmp_path / "saved")
    again = open_tokenizer(tmp_path / "saved")
    assert again.fingerprint == ours.fingerprint and again.vocab_size == 421
    (tmp_path / f"{file}.json").unlink()
    assert open_tokenizer(spm_file).fingerprint != ours.fingerprint


def test_an_added_token_that_is_not_special_is_found(spm_file, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(decoder(_421=("two words", False), _5=("<0x>", True))))
    ours = open_tokenizer(spm_file)
    assert ours.vocab_size == 422 and 421 in ours.encode("a two words b") and ours.decode([421]) == "two words"
    assert ours.decode([420]) == ""  # the id left out


def test_an_added_token_takes_over_the_piece_at_its_id(spm_file, spm_model, tmp_path):
    theirs = reference(spm_model)
    piece = theirs.encode("task")[0]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(decoder(**{f"_{piece}": ("<|plugin|>", True)})))
    ours = open_tokenizer(spm_file)
    assert ours.vocab_size == 420 and piece not in ours.encode("task") and ours.decode(ours.encode("task")) == "task"
    assert ours.control_tokens()[piece].content == "<|plugin|>"


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ({"_9000000": ("<a>", True)}, r"'<a>' the id 9000000; expected ids that go on from the 420 pieces"),
        ({"_420": ("</s>", True)}, r"'</s>' has two ids"),
        ({"_420": ("<a>", True), "_421": ("<a>", True)}, r"'<a>' has two ids"),
    ],
)
def test_added_tokens_that_cannot_be_are_refused(spm_file, tmp_path, tokens, words):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(decoder(**tokens)))
    with pytest.raises(TokenizerError, match=words):
        open_tokenizer(spm_file)


GLM_TOKENS = [
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "sop",
    "eop",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
]


@pytest.mark.parametrize("listed", [{}, decoder(_421=("[gMASK]", False), _423=("sop", False))])
def test_chatglms_tokens_follow_the_pieces_and_open_its_documents(spm_file, spm_model, tmp_path, listed):
    config = {"tokenizer_class": "ChatGLMTokenizer", **listed}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = open_tokenizer(spm_file)
    found = {i: token.content for i, token in ours.control_tokens().items() if i >= 420}
    assert found == dict(enumerate(GLM_TOKENS, start=420))
    assert ours.start_ids == (421, 423) and ours.vocab_size == 429
    for text in ("philosophy [gMASK]sop<|user|>", "sop"):
        assert ours.encode(text) == reference(spm_model).encode(text)
    assert ours.decode([421, 423, 426, *ours.encode("a task")]) == "a task"
    ours.save(tmp_path / "saved")
    again = open_tokenizer(tmp_path / "saved")
    assert again.fingerprint == ours.fingerprint and again.start_ids == ours.start_ids


def test_all_ids_that_end_an_answer_survive_saving(spm_file, tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": [7]}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 9, 4000], "temperature": 1}')
    ours = open_tokenizer(spm_file)
    assert ours.stop_ids == {2, 9} and ours.eos_id == 2
    ours.save(tmp_path / "saved")
    assert open_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint
    assert json.loads((tmp_path / "saved/generation_config.json").read_text()) == {"eos_token_id": [2, 9]}
