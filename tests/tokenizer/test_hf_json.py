import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from accessory.errors import TokenizerError
from accessory.tokenizer import open_tokenizer

CHATML = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
LLAMA = {"bos_token": "<s>", "eos_token": "</s>"}


def lay(directory, pipeline, config):
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(pipeline.to_str(), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def copy(pipeline):
    return Tokenizer.from_str(pipeline.to_str())


def test_ids_are_those_of_transformers(byte_level, tmp_path, awkward, sentences):
    ours = open_tokenizer(lay(tmp_path, byte_level, CHATML))
    theirs = PreTrainedTokenizerFast(tokenizer_object=copy(byte_level))
    texts = [text for text in awkward + sentences if "<|" not in text]
    expected = [theirs(text, add_special_tokens=False).input_ids for text in texts]
    assert [ours.encode(text) for text in texts] == expected
    assert ours.encode_batch(texts, threads=2) == expected
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.start_ids) == (400, 1, 2, ())


def test_a_continued_text_decodes_to_the_whole(byte_level, llama_like, tmp_path):
    metaspace = copy(llama_like)
    metaspace.normalizer = None
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    prefixed = copy(byte_level)
    prefixed.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=True)])
    plain = [(byte_level, CHATML), (llama_like, LLAMA), (metaspace, LLAMA)]
    for number, (pipeline, config) in enumerate(plain):
        ours = open_tokenizer(lay(tmp_path / str(number), pipeline, config))
        for text in ("Write a response", "the lazy dog, 1234 times!\n\n### Response:", "ab  cd"):
            for cut in range(1, len(text)):
                ids = ours.encode(text[:cut]) + ours.encode(text[cut:], continuation=True)
                assert ours.decode(ids) == text, (number, text, cut)
    ours = open_tokenizer(lay(tmp_path / "prefixed", prefixed, CHATML))
    assert ours.decode(ours.encode("a") + ours.encode("b", continuation=True)) == " ab"  # only the first is prefixed


def test_control_markers_in_a_text_stay_text(byte_level, tmp_path):
    pipeline = copy(byte_level)
    pipeline.add_tokens([AddedToken("<｜User｜>", special=False), AddedToken("<tool>", special=False)])
    ours = open_tokenizer(lay(tmp_path, pipeline, CHATML))
    assert pipeline.token_to_id("<｜User｜>") in pipeline.encode("<｜User｜>").ids
    for text in ("a<|im_end|>b", "<｜User｜>", "</s>"):
        ids = ours.encode(text)
        assert len(ids) > 1 and max(ids) < 400 and ours.eos_id not in ids and ours.decode(ids) == text
    assert ours.encode("<tool>") == [pipeline.token_to_id("<tool>")]
    assert ours.vocab_size == 402


def test_special_and_unknown_ids_decode_to_nothing(byte_level, tmp_path):
    ours = open_tokenizer(lay(tmp_path, byte_level, CHATML))
    ids = ours.encode("Write a task")
    assert ours.decode([ours.bos_id, *ids, ours.eos_id, 0, ours.vocab_size, -1]) == "Write a task"


@pytest.mark.parametrize(("stated", "expected"), [(None, True), (False, False), (True, True)])
def test_add_bos_is_stated_or_told_by_the_post_processor(byte_level, tmp_path, stated, expected):
    pipeline = copy(byte_level)
    pipeline.post_processor = processors.TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 1)])
    config = CHATML if stated is None else {**CHATML, "add_bos_token": stated}
    ours = open_tokenizer(lay(tmp_path, pipeline, config))
    assert ours.start_ids == ((1,) if expected else ())
    assert ours.bos_id not in ours.encode("Write")


def test_cutting_and_padding_of_the_file_are_switched_off(byte_level, tmp_path, sentences):
    pipeline = copy(byte_level)
    pipeline.enable_truncation(4)
    pipeline.enable_padding(length=16)
    ours = open_tokenizer(lay(tmp_path, pipeline, CHATML))
    for threads in (1, 2):
        short, long = ours.encode_batch(["a", sentences[0]], threads=threads)
        assert len(short) == 1 and ours.decode(long) == sentences[0]


def test_ids_of_config_json_serve_where_no_name_is_given(byte_level, tmp_path):
    lay(tmp_path, byte_level, {})
    (tmp_path / "config.json").write_text('{"eos_token_id": [2, 0], "bos_token_id": 0}')
    ours = open_tokenizer(tmp_path)
    assert (ours.eos_id, ours.bos_id) == (2, 0)


def test_saved_and_opened_again_it_is_equal(byte_level, tmp_path):
    lay(tmp_path, byte_level, {"model_max_length": 77})
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    ours = open_tokenizer(tmp_path)
    ours.save(tmp_path / "saved")
    assert open_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")  # other programs can read it too
    assert theirs.eos_token == "<|im_end|>" and theirs.model_max_length == 77


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "nor a file beside it names the end"),
        ({"eos_token": "<eos>"}, "eos_token '<eos>', which is no token"),
        ({"eos_token": "<|im_end|>", "bos_token": "<b>"}, "bos_token '<b>', which is no token"),
    ],
)
def test_missing_or_unknown_special_tokens_are_refused(byte_level, tmp_path, config, words):
    with pytest.raises(TokenizerError, match=words):
        open_tokenizer(lay(tmp_path, byte_level, config))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "an empty file"),
        ("<!DOCTYPE html>", "an HTML page"),
        ("version https://git-lfs.github.com/spec/v1\n", "a Git-LFS pointer"),
        ('{"version": "1.0", "mod', "whole and undamaged"),
        ('{"a": 1}', 'no "model" in it'),
        ('{"version": "1.0", "model": {"type": "Nonsense"}}', "tokenizers cannot use it"),
        ("[" * 100_000, "whole and undamaged"),
    ],
)
def test_what_is_no_tokenizer_is_named(tmp_path, content, words):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(TokenizerError, match=words) as caught:
        open_tokenizer(path)
    assert str(path) in str(caught.value) and "expected a tokenizer.json" in str(caught.value)


def test_a_marker_that_only_config_json_numbers_stays_text(byte_level, tmp_path):
    pipeline = copy(byte_level)
    pipeline.add_tokens([AddedToken("<eot>", special=False)])
    lay(tmp_path, pipeline, {})
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": pipeline.token_to_id("<eot>")}))
    ours = open_tokenizer(tmp_path)
    assert ours.eos_id in pipeline.encode("a<eot>").ids
    assert ours.eos_id not in ours.encode("a<eot>") and ours.decode(ours.encode("a<eot>")) == "a<eot>"


def test_unigram_does_not_find_markers_in_a_text(tmp_path):
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -9.0) for letter in "▁a</s>")]
    pipeline = Tokenizer(models.Unigram(pieces, unk_id=0))
    pipeline.pre_tokenizer, pipeline.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    pipeline.add_special_tokens(["<unk>", "</s>"])
    ours = open_tokenizer(lay(tmp_path, pipeline, {"eos_token": "</s>"}))
    assert ours.eos_id == 1 and 1 not in ours.encode("a</s>a") and ours.decode(ours.encode("a</s>a")) == "a</s>a"
    ours.save(tmp_path / "saved")
    assert open_tokenizer(tmp_path / "saved").encode("a</s>") == ours.encode("a</s>")


def test_a_document_opens_as_the_post_processor_says(byte_level, tmp_path):
    pipeline = copy(byte_level)
    pipeline.add_special_tokens(["[gMASK]", "<sop>"])
    ids = [("[gMASK]", 400), ("<sop>", 401), ("<|im_end|>", 2)]
    pipeline.post_processor = processors.TemplateProcessing("[gMASK] <sop> $A <|im_end|>", None, ids)
    ours = open_tokenizer(lay(tmp_path / "a", pipeline, {"eos_token": "<|im_end|>"}))
    assert ours.start_ids == (400, 401)
    ours.save(tmp_path / "saved")
    assert open_tokenizer(tmp_path / "saved").start_ids == (400, 401)


def test_end_and_beginning_are_told_apart_where_the_text_is_unknown(tmp_path):
    pipeline = Tokenizer(models.BPE({"<b>": 0, "<e>": 1, "x": 2}, []))
    pipeline.add_special_tokens(["<b>", "<e>"])
    pipeline.post_processor = processors.TemplateProcessing("<b> $A <e>", None, [("<b>", 0), ("<e>", 1)])
    ours = open_tokenizer(lay(tmp_path, pipeline, {"bos_token": "<b>", "eos_token": "<e>"}))
    assert ours.start_ids == (0,)


def test_tokens_that_only_the_config_adds(byte_level, tmp_path, sentences):
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    more = {"400": {"content": "<a>", "special": True, "rstrip": True}, "401": {"content": "<b>", "special": False}}
    ours = open_tokenizer(lay(tmp_path, byte_level, {**names, "added_tokens_decoder": more}))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ours.vocab_size == len(theirs) == 402
    assert ours.encode("a<b>c") == theirs("a<b>c", add_special_tokens=False).input_ids
    assert 400 not in ours.encode("x<a>") and ours.decode([400]) == "" and ours.control_tokens()[400].rstrip
    assert 401 not in ours.control_tokens()
    ours.save(tmp_path / "saved")
    assert open_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint
    lay(tmp_path, byte_level, {**names, "added_tokens_decoder": {"400": more["400"]}})
    assert open_tokenizer(tmp_path).fingerprint != ours.fingerprint
    lay(tmp_path, byte_level, {**names, "added_tokens_decoder": {"399": more["400"]}})
    with pytest.raises(TokenizerError, match="'<a>' the id 399, where this vocabulary has 400"):
        open_tokenizer(tmp_path)


def test_all_ids_that_end_an_answer(byte_level, tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": [0, 1]}')
    ours = open_tokenizer(lay(tmp_path, byte_level, CHATML))
    assert ours.eos_id == 2 and ours.stop_ids == {0, 1, 2}
    ours.save(tmp_path / "saved")
    again = open_tokenizer(tmp_path / "saved")
    assert again.fingerprint == ours.fingerprint and again.stop_ids == ours.stop_ids


@pytest.mark.parametrize(
    "changes",
    [
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 8}},
        {"normalizer": {"type": "Sequence", "normalizers": [], "pretokenizers": 5}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}], "normalizers": 5}},
    ],
    ids=["truncation that panics", "a key of another stage", "a key of another stage, too"],
)
def test_what_the_library_loads_and_nothing_of_ours_reads_is_no_fault(byte_level, tmp_path, changes):
    directory = lay(tmp_path, byte_level, CHATML)
    definition = json.loads(byte_level.to_str()) | changes
    (directory / "tokenizer.json").write_text(json.dumps(definition))
    theirs = Tokenizer.from_str(json.dumps(definition))
    theirs.no_truncation()
    assert open_tokenizer(directory).encode("Write 12 times") == theirs.encode("Write 12 times").ids


def test_a_tokenizer_model_beside_travels_as_it_is(llama_like, spm_model, tmp_path):
    """Tokens that it lacks are stated beside it, wherever they were listed and however they are matched."""
    pipeline = copy(llama_like)
    pipeline.add_tokens([AddedToken("<one>", lstrip=True, normalized=True, single_word=True)])
    plain = {"special": False, "lstrip": False, "rstrip": False, "normalized": True, "single_word": False}
    beside = {"501": {"content": "<two>", **plain}}
    directory = lay(tmp_path / "base", pipeline, {**LLAMA, "added_tokens_decoder": beside})
    (directory / "tokenizer.model").write_bytes(spm_model)
    ours = open_tokenizer(directory).with_added_tokens(["<new>"])
    ours.save(tmp_path / "saved")
    assert (tmp_path / "saved/tokenizer.model").read_bytes() == spm_model
    assert open_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint
    stated = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert stated["500"] == {"content": "<one>", **plain, "lstrip": True, "single_word": True}
    assert stated["501"] == {"content": "<two>", **plain}
    assert stated["502"] == {"content": "<new>", **plain, "normalized": False}
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert again.convert_tokens_to_ids(["<one>", "<two>", "<new>"]) == [500, 501, 502]


@pytest.mark.parametrize("left", [b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>", b""])
def test_what_a_failed_download_left_in_its_place_does_not_travel(llama_like, tmp_path, left):
    directory = lay(tmp_path / "base", llama_like, LLAMA)
    (directory / "tokenizer.model").write_bytes(left)
    open_tokenizer(directory).save(tmp_path / "saved")
    assert not (tmp_path / "saved/tokenizer.model").exists()
