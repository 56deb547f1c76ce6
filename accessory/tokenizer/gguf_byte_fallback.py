"""A tokenizer.json of Llama 2's kind (byte-fallback BPE, blanks as ▁) as GGUF's `llama` vocabulary.

That vocabulary's pieces have scores, as in sentencepiece: of all neighbours that can be merged, those are whose merged
piece has the highest score. A tokenizer.json ranks merges instead; `transformers` makes its ranks from scores.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from itertools import groupby
from typing import Literal

from accessory.errors import TokenizerError
from accessory.tokenizer.hf_json import JsonTokenizer
from accessory.tokenizer.pre_tokenization import merges_of, steps
from accessory.tokenizer.spm import BLANK, SentencePieceTokenizer

BYTE = re.compile("<0x[0-9A-F]{2}>")
Prefix = Literal["always", "first", "never"]
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
_PREPEND = {"type": "Prepend", "prepend": BLANK}
_WANTED = "expected what Llama 2's does: blanks become ▁, one may be put before a text, and nothing else"


def is_byte_fallback(pipeline: dict) -> bool:
    """Whether a tokenizer.json (parsed) is a BPE that falls back on bytes."""
    return pipeline["model"].get("type") == "BPE" and bool(pipeline["model"].get("byte_fallback"))


def space_prefix(pipeline: dict, source: str) -> Prefix:
    """Where a blank is put before text: always (each segment between added tokens), the first of a text, or never.

    `pipeline` is a tokenizer.json (parsed). Raises `TokenizerError` for one that changes or cuts text in another way.
    """
    normalizer, cuts = steps(pipeline.get("normalizer")), steps(pipeline.get("pre_tokenizer"))
    if not cuts and _REPLACE in normalizer and all(step in (_REPLACE, _PREPEND) for step in normalizer):
        return "always" if _PREPEND in normalizer else "never"
    if not normalizer and [cut["type"] for cut in cuts] == ["Metaspace"] and cuts[0].get("replacement") == BLANK:
        apart = cuts[0].get("split", True) and any(BLANK in token[1:] for token in pipeline["model"]["vocab"])
        if not apart:
            return cuts[0].get("prepend_scheme", "always" if cuts[0].get("add_prefix_space", True) else "never")
    raise TokenizerError(f"{source}: is a byte-fallback BPE that changes or cuts text in a way of its own; {_WANTED}.")


def merge_scores(model: dict, control: Collection[str], source: str) -> dict[str, float]:
    """Token that merges make -> its score, the highest for the first merge.

    `control` are the tokens that no text holds. Raises `TokenizerError` if merging by scores would give other tokens
    than merging by ranks, or if a byte has no token, without which llama.cpp cannot encode text.
    """
    ordinary = {token for token in model["vocab"] if token not in control and not BYTE.fullmatch(token)}
    if sum(map(bool, map(BYTE.fullmatch, model["vocab"]))) != 256:
        raise TokenizerError(f"{source}: lacks some of the tokens <0x00> to <0xFF>; llama.cpp needs all 256.")
    merges = merges_of(model)
    ranks, known = _ranks(merges), set(merges)
    others = (
        (token[:cut], token[cut:])
        for token in ordinary
        for cut in range(1, len(token))
        if (token[:cut], token[cut:]) not in known
    )
    forming = next((pair for pair in others if all(len(part) == 1 or part in ordinary for part in pair)), None)
    if forming or ranks is None:
        said = f"no merge joins {forming[0]!r} and {forming[1]!r}" if forming else "the merges of a token lie apart"
        raise TokenizerError(
            f"{source}: no scores of tokens give the order of its merges ({said}), and GGUF holds only scores. "
            "Give --tokenizer_path the tokenizer.model it was made from."
        )
    return {token: -float(rank) for token, rank in ranks.items()}


def _ranks(merges: list[tuple[str, ...]]) -> dict[str, int] | None:
    """The rank of each token that merges make, or None if the merges of a token lie apart.

    Merges into runs of one letter may be mixed if longer left parts come first. LLaMA's runs of blanks have equal
    scores, of which sentencepiece merges the leftmost; what is merged already stands on the left, so that this is the
    pair with the longest left part.
    """
    ranks: dict[str, int] = {}
    for _, group in groupby(merges, _letter_or_token):
        pairs = list(group)
        made = [token for token, _ in groupby(left + right for left, right in pairs)]
        alike, first = len(made) > len(set(made)), len(ranks)
        lengths = [len(left) for left, _ in pairs]
        if ranks.keys() & set(made) or (alike and lengths != sorted(lengths, reverse=True)):
            return None
        ranks |= {token: first if alike else first + place for place, token in enumerate(made)}
    return ranks


def _letter_or_token(merge: tuple[str, ...]) -> str:
    token = "".join(merge)
    return token[0] if token == token[0] * len(token) else token


def sentencepiece_beside(tokenizer: JsonTokenizer) -> SentencePieceTokenizer | None:
    """The tokenizer.model that lies beside a tokenizer.json, with its added tokens; None unless both cut alike."""
    if tokenizer.model_file is None:
        return None
    special = replace(tokenizer.special, added=tokenizer.added_tokens())
    beside = SentencePieceTokenizer(tokenizer.model_file, special, source=tokenizer.source)
    spelled = (piece for piece in beside.proto.pieces if piece.type in (piece.NORMAL, piece.USER_DEFINED))
    texts = [piece.piece.replace(BLANK, " ") for piece in spelled]
    alike = beside.vocab_size == tokenizer.vocab_size and all(
        beside.encode_batch(texts, continuation=going_on) == tokenizer.encode_batch(texts, continuation=going_on)
        for going_on in (True, False)
    )
    return beside if alike else None
