import pytest

from accessory.errors import TokenizerError
from accessory.tokenizer.base import StatedTokenizer, choose_start_ids, looks_like_control
from accessory.tokenizer.special import SpecialTokens


class Characters(StatedTokenizer):
    """The smallest vocabulary there is: code points below 128."""

    def __init__(self, definition=b"", source="x", **special):
        self.vocab_size, self.source = 128, source
        self.special = SpecialTokens(**{"bos_id": 1, "eos_id": 2, **special})
        self._set_special(definition)

    def token(self, token_id):
        return chr(token_id)

    def token_id(self, token):
        return ord(token) if token < "\x80" else None

    def usual_start_ids(self):
        return (self.bos_id,)

    def with_special(self, special):
        raise NotImplementedError

    def encode_batch(self, texts, *, continuation=False, threads=1):
        return [[ord(letter) for letter in text] for text in texts]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def save(self, directory):
        raise NotImplementedError


@pytest.mark.parametrize("token", ["<|im_end|>", "<｜User｜>", "<s>", "</s>", "[INST]", "[/INST]"])
def test_chat_markers_look_like_control(token):
    assert looks_like_control(token)


@pytest.mark.parametrize("token", ["<table>", "▁▁", "\n\n", "<|", "a<|b|>", "[DATE]", ""])
def test_other_tokens_do_not(token):
    assert not looks_like_control(token)


def test_encode_is_a_batch_of_one():
    assert Characters().encode("ab") == [97, 98]


def test_fingerprint_tells_every_setting_apart():
    variants = [{}, {"bos_id": 3}, {"eos_id": 3}, {"add_bos": False}, {"stop_ids": [5]}, {"definition": b"y"}]
    assert len({Characters(**variant).fingerprint for variant in variants}) == len(variants)
    assert Characters().fingerprint == Characters(source="elsewhere").fingerprint


def test_every_stop_id_within_the_vocabulary_counts_and_eos_always():
    assert Characters(stop_ids=[2, 5, 128, -1]).stop_ids == {2, 5}
    assert Characters().stop_ids == {2}


@pytest.mark.parametrize(
    ("usual", "bos_id", "stated", "expected"),
    [
        ((1,), 1, None, (1,)),
        ((1,), 1, False, ()),
        ((), 1, True, (1,)),
        ((7, 8), 1, False, (7, 8)),
        ((7, 8), None, True, (7, 8)),
        ((7, 1), 1, True, (7, 1)),
    ],
)
def test_bos_is_put_in_or_left_out_where_a_file_says_so(usual, bos_id, stated, expected):
    assert choose_start_ids(usual, bos_id, stated) == expected


@pytest.mark.parametrize(("key", "value"), [("eos_id", 128), ("bos_id", -1)])
def test_special_id_beyond_the_vocabulary_is_refused(key, value):
    with pytest.raises(TokenizerError, match=rf"{key[:3]}_token the id {value}, which is no token of it.*0 to 127"):
        Characters(**{key: value})
