import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors

from accessory.errors import TokenizerError
from accessory.tokenizer import open_tokenizer
from accessory.tokenizer.gguf_fields import vocabulary_fields
from accessory.tokenizer.pre_tokenization import PRE_TOKENIZATIONS, pre_tokenization_name
from tests.tokenizer.gguf_files import write_fields

CHATML = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": "{{ x }}"}


def lay(directory, pipeline, config):
    (directory / "tokenizer.json").write_text(pipeline.to_str(), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return open_tokenizer(directory)


def alike(one, other, texts):
    for name in ("bos_id", "eos_id", "start_ids", "stop_ids", "chat_template"):
        assert getattr(one, name) == getattr(other, name), name
    for text in texts:
        for continuation in (False, True):
            ids = one.encode(text, continuation=continuation)
            assert other.encode(text, continuation=continuation) == ids, text
        assert other.decode(ids) == one.decode(ids)


def with_cutting(pipeline, pre):
    made = json.loads(pipeline.to_str())
    model = made["model"]
    way = PRE_TOKENIZATIONS[pre].pipeline(model["vocab"], [tuple(merge) for merge in model["merges"]])
    ours = json.loads(way.to_str())
    return Tokenizer.from_str(
        json.dumps({**made, **{key: ours[key] for key in ("normalizer", "pre_tokenizer", "model")}})
    )


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "olmo", "bloom"])
def test_a_byte_level_vocabulary_comes_back(byte_level, tmp_path, pre, awkward, sentences):
    pipeline = with_cutting(byte_level, pre)
    pipeline.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<｜end｜>", special=True)])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 401]}')
    ours = lay(tmp_path, pipeline, {**CHATML, "add_bos_token": True})
    fields = vocabulary_fields(ours, 410)
    assert (fields["tokenizer.ggml.pre"], fields["tokenizer.ggml.eot_token_id"]) == (pre, 401)
    assert fields["tokenizer.ggml.tokens"][400:404] == ["<tool>", "<｜end｜>", "[PAD402]", "[PAD403]"]
    assert fields["tokenizer.ggml.token_type"][399:403] == [1, 4, 3, 5]
    again = open_tokenizer(write_fields(tmp_path / "v.gguf", ours, 410))
    alike(ours, again, [*awkward, *sentences, "a<tool>b", "cafe\u0301", "[PAD402] [PAD403]"])
    assert again.vocab_size == 410 and again.decode([405, 401]) == ""


def test_glm_is_told_from_llama3_by_what_opens_a_document(byte_level, tmp_path, sentences):
    pipeline = with_cutting(byte_level, "llama-bpe")
    pipeline.add_special_tokens(["[gMASK]", "<sop>"])
    ids = [("[gMASK]", 400), ("<sop>", 401)]
    pipeline.post_processor = processors.TemplateProcessing("[gMASK] <sop> $A", None, ids)
    ours = lay(tmp_path, pipeline, {"eos_token": "<|endoftext|>"})
    assert ours.start_ids == (400, 401)
    assert vocabulary_fields(ours, 402)["tokenizer.ggml.pre"] == "glm4"
    alike(ours, open_tokenizer(write_fields(tmp_path / "v.gguf", ours, 402)), sentences)


def test_a_token_that_no_merges_lead_to_needs_the_same_way(byte_level):
    model = json.loads(with_cutting(byte_level, "llama-bpe").to_str())
    assert pre_tokenization_name(model, ()) == "llama-bpe"
    model["model"]["ignore_merges"] = False
    assert pre_tokenization_name(model, ()) == "llama-bpe"
    model["model"]["vocab"]["zqx"] = 400
    assert pre_tokenization_name(model, ()) == "dbrx"
    model["model"]["ignore_merges"] = True
    model["pre_tokenizer"] = json.loads(byte_level.to_str())["pre_tokenizer"]
    assert pre_tokenization_name(model, ()) is None


def test_words_for_the_same_way_do_not_matter(byte_level):
    pipeline = json.loads(byte_level.to_str())
    inner = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    pipeline["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [inner]}
    pipeline["normalizer"] = {"type": "Sequence", "normalizers": []}
    assert pre_tokenization_name(pipeline, ()) == "gpt-2"
    pipeline["normalizer"]["normalizers"] = [{"type": "NFC"}]
    assert pre_tokenization_name(pipeline, ()) == "olmo"


@pytest.mark.parametrize(
    "change",
    [
        lambda pipeline: setattr(pipeline, "normalizer", normalizers.NFKC()),
        lambda pipeline: setattr(pipeline, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda pipeline: setattr(pipeline, "pre_tokenizer", pre_tokenizers.Split(Regex("x"), "removed")),
    ],
)
def test_a_cutting_without_name_is_refused(byte_level, tmp_path, change):
    pipeline = Tokenizer.from_str(byte_level.to_str())
    change(pipeline)
    with pytest.raises(TokenizerError, match=r"tokenizer.json: cuts text in a way that GGUF has no name for"):
        vocabulary_fields(lay(tmp_path, pipeline, CHATML), 400)


def test_an_opening_without_words_is_refused(byte_level, tmp_path):
    pipeline = Tokenizer.from_str(byte_level.to_str())
    ids = [("<|im_start|>", 1), ("<|endoftext|>", 0)]
    pipeline.post_processor = processors.TemplateProcessing("<|im_start|> <|endoftext|> $A", None, ids)
    with pytest.raises(TokenizerError, match=r"documents open with '<\|im_start\|>', '<\|endoftext\|>'"):
        vocabulary_fields(lay(tmp_path, pipeline, CHATML), 400)


def test_a_vocabulary_that_lacks_a_byte_comes_back(byte_level, tmp_path):
    """SmolLM2's lacks 21; what it cannot encode it drops, before and after."""
    made = json.loads(byte_level.to_str())
    del made["model"]["vocab"]["z"]
    made["model"]["merges"] = [merge for merge in made["model"]["merges"] if "z" not in "".join(merge)]
    ours = lay(tmp_path, Tokenizer.from_str(json.dumps(made)), CHATML)
    alike(ours, open_tokenizer(write_fields(tmp_path / "lacking.gguf", ours, 400)), ["a zebra", "zz", "plain"])


def test_pipelines_that_are_not_byte_level_are_refused(llama_like, tmp_path):
    pipeline = Tokenizer.from_str(llama_like.to_str())
    pipeline.model.byte_fallback = False
    with pytest.raises(TokenizerError, match="cuts text in a way"):
        vocabulary_fields(lay(tmp_path, pipeline, {"eos_token": "</s>"}), 500)


def test_a_vocabulary_without_merges_is_refused(byte_level, tmp_path):
    """llama.cpp loads none."""
    made = json.loads(byte_level.to_str())
    made["model"]["merges"] = []
    with pytest.raises(TokenizerError, match=r"tokenizer.json: has no merges; llama.cpp loads no byte-level"):
        vocabulary_fields(lay(tmp_path, Tokenizer.from_str(json.dumps(made)), CHATML), 400)


@pytest.mark.parametrize("settings", [{}, {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_model_comes_back(train_sentencepiece, tmp_path, settings, prefix, awkward, sentences):
    model = train_sentencepiece(user_defined_symbols=["<|im_end|>", "<tag>"], add_dummy_prefix=prefix, **settings)
    (tmp_path / "tokenizer.model").write_bytes(model)
    decoder = {"420": {"content": "[PAD]", "special": True}, "421": {"content": "<tool>", "special": False}}
    config = {"added_tokens_decoder": decoder, "add_bos_token": False, "chat_template": "{{ x }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = open_tokenizer(tmp_path)
    fields = vocabulary_fields(ours, 425)
    assert fields["tokenizer.ggml.tokens"][420:424] == ["[PAD]", "<tool>", "[PAD422]", "[PAD423]"]
    assert fields["tokenizer.ggml.token_type"][420:424] == [3, 4, 5, 5]
    again = open_tokenizer(write_fields(tmp_path / "v.gguf", ours, 425))
    alike(ours, again, [*awkward, *sentences, "ﬁne　½", "a<tool>b[PAD]", "[PAD423]"])
    assert again.vocab_size == 425 and again.decode([420, 424]) == ""


def test_chatglm_opens_its_documents_after_gguf_too(spm_model, tmp_path, sentences):
    (tmp_path / "tokenizer.model").write_bytes(spm_model)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}')
    ours = open_tokenizer(tmp_path)
    again = open_tokenizer(write_fields(tmp_path / "v.gguf", ours, 440))
    alike(ours, again, sentences)
    again.save(tmp_path / "saved")
    assert open_tokenizer(tmp_path / "saved").fingerprint == again.fingerprint
    more = again.with_added_tokens(["<tok>"])
    assert more.added_tokens()[440].content == "<tok>" and more.start_ids == ours.start_ids


def test_a_unigram_model_is_refused(train_sentencepiece, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(model_type="unigram", vocab_size=340))
    with pytest.raises(TokenizerError, match=r"tokenizer.model: is not a sentencepiece model of merges"):
        vocabulary_fields(open_tokenizer(tmp_path), 400)


def test_fewer_rows_than_tokens_are_refused(spm_file):
    with pytest.raises(TokenizerError, match="419 embedding rows; expected 420"):
        vocabulary_fields(open_tokenizer(spm_file), 419)
