"""Corpora of data files that tests write."""

import numpy as np

from accessory.data.corpus import build_corpus

GOOD = {"instruction": "q", "output": "ab"}
CHAT = "META: [{path: x.json, prompt_type: chat}]"
DROPPING = (
    "{% for m in messages %}{{ m.role }}:{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def ids(text):
    """Of the bytes, without what opens a text."""
    return [byte + 3 for byte in text.encode()]


def make(path, tokenizer, **settings):
    """The corpus, with room for every document."""
    return build_corpus(path, tokenizer, **{"max_words": 4096, **settings})


def same(one, other):
    """Whether two corpora hold the same documents and call themselves the same."""
    return one.fingerprint == other.fingerprint and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("tokens", "learned", "offsets")
    )


def conversation(*turns):
    """A record of (who, words), as ShareGPT has it."""
    return {"conversations": [{"from": role, "value": words} for role, words in turns]}
