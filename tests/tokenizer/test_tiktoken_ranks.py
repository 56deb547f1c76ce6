import base64
import json
from itertools import pairwise

import gguf
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from accessory.errors import TokenizerError
from accessory.tokenizer import open_tokenizer
from accessory.tokenizer.gguf_fields import add_fields, vocabulary_fields
from accessory.tokenizer.transformers_files import save_for_transformers

# As Meta's tokenizer.py has it.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUT = pre_tokenizers.Split(Regex(PATTERN), "isolated")


@pytest.fixture(scope="module")
def ranks(sentences) -> dict[bytes, int]:
    """A vocabulary of 500 tokens, the bytes first, among them runs of one letter, whose parts overlap."""
    pipeline = Tokenizer(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.Sequence(
        [CUT, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False)
    pipeline.train_from_iterator([*sentences, "aaaa aaaaaaaa", "--- ------- =====", "日本語 🙂"] * 20, trainer)
    letters = {pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(i))[-1][0]: i for i in range(128)}
    known = [token for token in pipeline.get_vocab() if len(token) > 1 and set(token) <= letters.keys()]
    learned = [bytes(letters[letter] for letter in token) for token in sorted(known, key=pipeline.get_vocab().get)]
    longer = ["日".encode()[:2], "日".encode(), "🙂".encode()[:2], b"aaa", b"aaaaa", b"---"]
    whole = dict.fromkeys([*(bytes([byte]) for byte in range(256)), *learned, *longer])
    return {token: rank for rank, token in enumerate(whole)}


def write(path, ranks):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


def byte_pair_merge(word, ranks):
    """tiktoken's way: a word that is a token, or the pair of the lowest rank joined, leftmost first, until none is."""
    parts = [word] if word in ranks else [bytes([byte]) for byte in word]
    while joined := [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
        _, i = min(joined)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [ranks[part] for part in parts]


def reference(text, ranks):
    return [i for word, _ in CUT.pre_tokenize_str(text) for i in byte_pair_merge(word.encode(), ranks)]


def test_ids_are_those_of_tiktoken(tmp_path, ranks, strings):
    ours = open_tokenizer(write(tmp_path / "tokenizer.model", ranks))
    texts = [*strings, *(letter * count for letter in "a-= \n" for count in range(1, 40))]
    wrong = [text for text in texts if ours.encode(text) != reference(text, ranks)]
    assert not wrong
    assert [ours.decode(ours.encode(text)) for text in texts] == texts


def test_special_tokens_are_metas(tmp_path, ranks):
    ours, first = open_tokenizer(write(tmp_path / "a" / "tokenizer.model", ranks).parent), len(ranks)
    names = {token_id - first: token.content for token_id, token in ours.control_tokens().items()}
    assert [names[i] for i in (0, 1, 6, 7, 9)] == [
        "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
    ]  # fmt: skip
    assert names[255] == "<|reserved_special_token_247|>" and len(names) == 256
    assert (ours.start_ids, ours.eos_id, ours.vocab_size) == ((first,), first + 1, first + 256)
    assert ours.stop_ids == {first + 1, first + 8, first + 9}
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"eos_token": "<|eot_id|>", "add_bos_token": false}')
    stated = open_tokenizer(tmp_path / "a")
    assert stated.eos_id == first + 9 and stated.start_ids == ()


def test_saved_and_written_for_transformers(tmp_path, ranks, strings):
    """The .model travels with what is saved; beside a Hugging Face model that name is sentencepiece's."""
    path = write(tmp_path / "a" / "tokenizer.model", ranks)
    ours = open_tokenizer(path).with_added_tokens(["<new>"])
    ours.save(tmp_path / "saved")
    assert open_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint
    assert (tmp_path / "saved/tokenizer.model").read_bytes() == path.read_bytes()
    save_for_transformers(ours, tmp_path / "hf")
    assert not (tmp_path / "hf/tokenizer.model").exists()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf", split_special_tokens=True)
    wrong = [text for text in strings if theirs(text).input_ids != [len(ranks), *reference(text, ranks)]]
    assert not wrong and theirs.convert_tokens_to_ids("<new>") == len(ranks) + 256 == ours.vocab_size - 1
    assert open_tokenizer(tmp_path / "hf").encode_batch(strings) == ours.encode_batch(strings)


def test_written_to_gguf_and_read_back(tmp_path, ranks, strings):
    ours = open_tokenizer(write(tmp_path / "tokenizer.model", ranks))
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    add_fields(writer, vocabulary_fields(ours, ours.vocab_size))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    again = open_tokenizer(tmp_path / "v.gguf")
    assert again.encode_batch(strings) == ours.encode_batch(strings)
    assert (again.start_ids, again.stop_ids) == (ours.start_ids, ours.stop_ids)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda lines: [*lines[:7], b"%%% 7", *lines[8:]],
            r"line 8: found b'%%% 7'; expected lines of base64 and rank",
        ),
        (lambda lines: [*lines, b"QUFBQQ== x"], r"line \d+: found b'QUFBQQ== x'"),
        (lambda lines: lines[:200], "with 200 tokens; .* each token and rank once, all 256 bytes among them"),
        (lambda lines: [*lines, lines[-1]], "each token and rank once"),
        (
            lambda lines: [*lines, base64.b64encode(b" don't") + b" %d" % len(lines)],
            r'" don\'t", which Llama 3 would cut',
        ),
    ],
)
def test_what_is_no_llama_3_is_refused(tmp_path, ranks, change, words):
    path = write(tmp_path / "tokenizer.model", ranks)
    path.write_bytes(b"\n".join(change(path.read_bytes().splitlines())) + b"\n")
    with pytest.raises(TokenizerError, match=words) as caught:
        open_tokenizer(path)
    assert str(path) in str(caught.value)


def test_under_another_name_it_is_told_what_it_is(tmp_path, ranks):
    path = write(tmp_path / "qwen.tiktoken", ranks)
    with pytest.raises(TokenizerError, match=r"found a tiktoken vocabulary of \d+ bytes named '.tiktoken'; expected a"):
        open_tokenizer(path)


def test_saved_settings_need_no_other_file(tmp_path, ranks):
    open_tokenizer(write(tmp_path / "a" / "tokenizer.model", ranks)).save(tmp_path / "saved")
    stated = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert (stated["bos_token"], stated["eos_token"], stated["add_bos_token"]) == (
        "<|begin_of_text|>", "<|end_of_text|>", True
    )  # fmt: skip
