import json
import re

import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors
from transformers import AutoTokenizer

from accessory.errors import TokenizerError
from accessory.tokenizer import Chat, open_tokenizer
from accessory.tokenizer.transformers_files import save_for_transformers
from tests.tokenizer.gguf_files import write, write_byte_level

LLAMA = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATE = "{% for m in messages %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' + eos_token }} {% endfor %}"
TALK = [{"role": "user", "content": content} for content in (" Name a colour.\n", "naïve 日本語")]
FILES = {"tokenizer.json", "tokenizer_config.json"}


def lay(directory, vocabulary, **config):
    directory.mkdir()
    name = "tokenizer.model" if isinstance(vocabulary, bytes) else "tokenizer.json"
    (directory / name).write_bytes(vocabulary if isinstance(vocabulary, bytes) else vocabulary.to_str().encode())
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def differing(texts, ours, theirs):
    """The texts that two readers encode differently."""
    return [(text, a, b) for text, a, b in zip(texts, ours, theirs, strict=True) if a != b]


def read_back(ours, directory, strings):
    """What transformers makes of the files: the ids of every text, BOS included, and of a conversation."""
    save_for_transformers(ours, directory)
    theirs = AutoTokenizer.from_pretrained(directory)
    special = {token.content for token in theirs.added_tokens_decoder.values() if token.special}
    plain = [text for text in strings if not any(name in text for name in special)]
    assert len(plain) > 200
    opened = [[*ours.start_ids, *ids] for ids in ours.encode_batch(plain)]
    assert not differing(plain, opened, [theirs(text).input_ids for text in plain])
    known = [ids for ids in opened if theirs.unk_token_id not in ids]
    decoded = [theirs.decode(ids, skip_special_tokens=True) for ids in known]
    assert not differing(known, map(ours.decode, known), decoded)
    if ours.chat_template is not None:
        assert Chat(ours).ids(TALK) == theirs.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (ours.bos_id, ours.eos_id, ours.vocab_size)
    theirs.backend_tokenizer.encode_special_tokens = True  # control tokens that a text spells are text
    opened = [[*ours.start_ids, *ids] for ids in ours.encode_batch(strings)]
    assert not differing(strings, opened, [theirs.backend_tokenizer.encode(text).ids for text in strings])
    theirs.backend_tokenizer.encode_special_tokens = False
    again = open_tokenizer(directory)
    assert (again.start_ids, again.stop_ids, again.bos_id) == (ours.start_ids, ours.stop_ids, ours.bos_id)
    for continuation in (False, True):
        both = (tokenizer.encode_batch(strings, continuation=continuation) for tokenizer in (ours, again))
        assert not differing(strings, *both)
    return theirs


MODELS = {
    "llama": {},
    "no byte fallback": {"byte_fallback": False, "vocab_size": 200},
    "no made-up blank": {"add_dummy_prefix": False},
    "blanks removed, NFKC": {"remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
    "user-defined": {"user_defined_symbols": ["<tag>", "    ", "y <", "\n", "(x", "."]},
    "unigram": {"model_type": "unigram", "vocab_size": 350, "user_defined_symbols": ["<tag>"]},
}


def with_runs_of_blanks(definition):
    """As in LLaMA's own model: pieces of several blanks, all of the lowest score."""
    proto = ModelProto.FromString(definition)
    known = {piece.piece for piece in proto.pieces}
    for run in ("▁" * length for length in range(2, 17)):
        if run not in known:
            proto.pieces.add(piece=run, type=ModelProto.SentencePiece.NORMAL)
    for piece in proto.pieces:
        piece.score = -1e9 if set(piece.piece) == {"▁"} else piece.score
    return proto.SerializeToString()


CONFIGS = [{}, {"legacy": False}, {"add_bos_token": False}]
REFUSED = ("blanks removed, NFKC", {"legacy": False})  # as another test shows


@pytest.mark.parametrize(
    ("kind", "config"), [(kind, config) for kind in MODELS for config in CONFIGS if (kind, config) != REFUSED], ids=str
)
def test_a_sentencepiece_model_is_read_as_sentencepiece_reads_it(train_sentencepiece, tmp_path, strings, kind, config):
    definition = train_sentencepiece(**MODELS[kind])
    if kind == "llama":
        definition = with_runs_of_blanks(definition)
    strings = [*strings, *(" " * count for count in range(3, 80))]
    if kind == "unigram":
        strings = [
            text for text in strings if not re.search("<(unk|s|/s|0x0A)>", text)
        ]  # cut elsewhere than in other text
    if kind.startswith("blanks"):
        strings = [text for text in strings if "\r\n" not in text]  # one letter to the library's table of letters
    ours = open_tokenizer(lay(tmp_path / "base", definition, chat_template=TEMPLATE, **LLAMA, **config))
    reference = sentencepiece.SentencePieceProcessor(model_proto=definition)
    assert not differing(strings, ours.encode_batch(strings), reference.encode(strings))
    theirs = read_back(ours, tmp_path / "out", strings)
    assert theirs.unk_token_id == 0
    assert (tmp_path / "out/tokenizer.model").read_bytes() == definition
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*FILES, "tokenizer.model"}


def test_added_tokens_of_a_sentencepiece_model(train_sentencepiece, tmp_path, strings):
    """Listed beside it or asked for by a user, special or found in texts."""
    decoder = {"423": {"content": "<tag>", "special": False}, "421": {"content": "<pad>", "special": True}}
    config = {"added_tokens_decoder": decoder, "pad_token": "<pad>", "chat_template": TEMPLATE, **LLAMA}
    ours = open_tokenizer(lay(tmp_path / "base", train_sentencepiece(), **config))
    ours = ours.with_added_tokens(["<new>", "[INST]"])
    theirs = read_back(ours, tmp_path / "out", [*strings, "a<new>b<tag> c"])
    assert theirs.convert_tokens_to_ids(["<pad>", "<tag>", "<new>", "[INST]"]) == [421, 423, 424, 425]
    assert theirs.pad_token_id == 421 and theirs("<tag>").input_ids[-1] == 423
    beside = json.loads((tmp_path / "out/added_tokens.json").read_text())
    assert beside == {"<pad>": 421, "<tag>": 423, "<new>": 424, "[INST]": 425}
    texts = [*strings, "a<new>b<tag> c"]
    assert open_tokenizer(tmp_path / "out/tokenizer.model").encode_batch(texts) == ours.encode_batch(texts)
    again = open_tokenizer(tmp_path / "out")
    again.save(tmp_path / "again")
    assert json.loads((tmp_path / "again/added_tokens.json").read_text()) == beside
    assert open_tokenizer(tmp_path / "again").encode_batch(texts) == ours.encode_batch(texts)
    assert again.with_added_tokens(["<new>"]) is again


def test_chatglm(spm_model, tmp_path, strings):
    """Its own class, which is not in transformers, is not asked for; its two opening tokens stay."""
    config = {"tokenizer_class": "ChatGLMTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_chatglm.X", None]}}
    ours = open_tokenizer(lay(tmp_path / "base", spm_model, **config))
    assert read_back(ours, tmp_path / "out", strings)("a").input_ids[:2] == [421, 423]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("treat_whitespace_as_suffix", "does not mark blanks before words"),
        ("remove_extra_whitespaces", r'by "legacy": false, not behind a control token; a tokenizer.json cannot'),
    ],
)
def test_what_the_library_cannot_imitate_is_refused(train_sentencepiece, tmp_path, setting, words):
    ours = open_tokenizer(lay(tmp_path / "base", train_sentencepiece(**{setting: True}), legacy=False))
    with pytest.raises(TokenizerError, match=words):
        save_for_transformers(ours, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def metaspace(pipeline, scheme):
    made = Tokenizer.from_str(pipeline.to_str())
    made.normalizer, made.pre_tokenizer = None, pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return made


@pytest.mark.parametrize("stated", [{}, {"add_bos_token": True}, {"add_bos_token": False}], ids=str)
@pytest.mark.parametrize("kind", ["byte level", "opened", "prepend", "first", "always"])
def test_a_tokenizer_json_is_read_as_it_is(byte_level, llama_like, tmp_path, strings, kind, stated):
    """Whatever class its directory asks for: transformers 5 lays out a Llama's pipeline anew."""
    if kind in ("byte level", "opened"):
        pipeline, config = Tokenizer.from_str(byte_level.to_str()), {"bos_token": "<|im_start|>"}
        config |= {"eos_token": "<|im_end|>", "tokenizer_class": "LlamaTokenizerFast"}
        if kind == "opened":
            pipeline.post_processor = processors.TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 1)])
    else:
        pipeline = llama_like if kind == "prepend" else metaspace(llama_like, kind)
        config = {"tokenizer_class": "LlamaTokenizer", **LLAMA}
    ours = open_tokenizer(lay(tmp_path / "base", pipeline, chat_template=TEMPLATE, **config, **stated))
    assert ours.start_ids == ((1,) if stated.get("add_bos_token", kind == "opened") else ())
    read_back(ours, tmp_path / "out", strings)


def test_flags_of_added_tokens_stay(byte_level, tmp_path, strings):
    pipeline = Tokenizer.from_str(byte_level.to_str())
    flags = [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}, {"special": True}]
    made = [AddedToken(f"<{next(iter(one))}>", **{"normalized": False, **one}) for one in flags]
    pipeline.add_tokens(made)
    beside = {"405": {"content": "<beside>", "single_word": True, "normalized": True, "special": False}}
    config = {"added_tokens_decoder": beside, "model_max_length": 77, "clean_up_tokenization_spaces": True}
    ours = open_tokenizer(lay(tmp_path / "base", pipeline, eos_token="<|im_end|>", **config))
    texts = [f"a {token.content} b{token.content}c" for token in made] + ["a <beside> b<beside>c"]
    save_for_transformers(ours, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    stated = theirs.added_tokens_decoder
    assert [stated[400 + place] for place in range(5)] == made
    assert stated[405] == AddedToken("<beside>", single_word=True, normalized=True)
    theirs.backend_tokenizer.encode_special_tokens = True
    assert [theirs.backend_tokenizer.encode(text).ids for text in texts] == ours.encode_batch(texts)
    assert theirs.model_max_length == 77 and theirs.clean_up_tokenization_spaces


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2"])
def test_a_gguf_vocabulary_of_merges(byte_level, tmp_path, strings, pre):
    """Llama 3 opens documents with BOS, which no `add_bos_token` tells transformers."""
    ours = open_tokenizer(write_byte_level(tmp_path / "v.gguf", byte_level, pre, chat_template=TEMPLATE))
    assert ours.start_ids == ((1,) if pre == "llama-bpe" else ())
    read_back(ours, tmp_path / "out", strings)


def test_a_gguf_vocabulary_of_scores(train_sentencepiece, tmp_path, strings):
    pieces = ModelProto.FromString(train_sentencepiece()).pieces
    columns = [[getattr(piece, name) for piece in pieces] for name in ("piece", "type", "score")]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "chat_template": TEMPLATE}
    ours = open_tokenizer(write(tmp_path / "v.gguf", "llama", *columns[:2], scores=columns[2], **ids))
    read_back(ours, tmp_path / "out", strings)
