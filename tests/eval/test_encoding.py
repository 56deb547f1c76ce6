"""Texts to ids under both protocols."""

from __future__ import annotations

import pytest

from accessory.errors import ConfigError, DataError
from accessory.eval.encoding import Encoding
from accessory.eval.scoring import Continuation
from accessory.meta import MetaModel


def test_together_as_a_document(model: MetaModel) -> None:
    """0.4: BOS, one tokenization for both, spaces at a context's end go to the word; BOS alone without a context."""
    encode, bos = model.tokenizer.encode, model.tokenizer.bos_id
    found = Encoding(model.tokenizer).continuations([("The sun", " is"), ("The sun ", "is"), ("", "Hi")])
    whole, context = [bos, *encode("The sun is")], [bos, *encode("The sun")]
    assert found[0] == found[1] == Continuation(context, whole[len(context) :])
    assert found[2] == Continuation([bos], encode("Hi"))
    assert Encoding(model.tokenizer).document("Hi") == [bos, *encode("Hi")]


def test_apart_without_bos(model: MetaModel) -> None:
    """0.3: each text by itself; EOS stands before a text without context."""
    encode, encoding = model.tokenizer.encode, Encoding(model.tokenizer, "0.3")
    pairs = [("The sun ", "is"), ("ab", "c"), ("", "Hi")]
    assert encoding.continuations(pairs) == [
        Continuation(encode("The sun "), encode("is")),
        Continuation(encode("ab"), encode("c")),
        Continuation([model.tokenizer.eos_id], encode("Hi")),
    ]
    assert encoding.document("Hi") == encode("Hi")


def test_faults(model: MetaModel) -> None:
    with pytest.raises(ConfigError, match=r"--protocol '0.5' is unknown"):
        Encoding(model.tokenizer, "0.5")
    with pytest.raises(DataError, match="nothing to score after 'a'"):
        Encoding(model.tokenizer).continuations([("a", "")])
