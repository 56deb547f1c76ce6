"""A tokenizer.json of Llama 2's kind (byte-fallback BPE, blanks as ▁) as GGUF's `llama` vocabulary.

There pieces have scores, as in sentencepiece, where tokenizer.json ranks merges: of all neighbours that are a piece
together, those are merged whose piece has the highest score. The `transformers` library ranks merges by such scores.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import groupby
from typing import Literal

from accessory.errors import TokenizerError
from accessory.tokenizer.cutting import merges_of, steps

BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
BYTE = re.compile("<0x[0-9A-F]{2}>")
Prefix = Literal["always", "first", "never"]
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
_PREPEND = {"type": "Prepend", "prepend": BLANK}
_WANTED = "expected what Llama 2's does: blanks become ▁, one may be put before a text, and nothing else"


def space_prefix(pipeline: dict, source: str) -> Prefix:
    """Where a blank is put before text: each stretch between added tokens, the first of a text, or none.

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
    """Scores of the tokens that merges lead to, the first ones' being the highest.

    `control` are the tokens that no text holds. Raises `TokenizerError` where merging by scores is another thing than
    merging by ranks, or where a byte has no token: llama.cpp cannot encode a text then.
    """
    ordinary = {token for token in model["vocab"] if token not in control and not BYTE.fullmatch(token)}
    if sum(map(bool, map(BYTE.fullmatch, model["vocab"]))) != 256:
        raise TokenizerError(f"{source}: lacks some of the tokens <0x00> to <0xFF>; llama.cpp needs all 256.")
    merges = merges_of(model)
    made = [token for token, _ in groupby(left + right for left, right in merges)]
    known = set(merges)
    others = (
        (token[:cut], token[cut:])
        for token in ordinary
        for cut in range(1, len(token))
        if (token[:cut], token[cut:]) not in known
    )
    forming = next((pair for pair in others if all(len(part) == 1 or part in ordinary for part in pair)), None)
    if forming or len(made) != len(set(made)):
        said = f"no merge joins {forming[0]!r} and {forming[1]!r}" if forming else "merges of one token lie apart"
        raise TokenizerError(
            f"{source}: its merges follow no scores of tokens ({said}), which is all that GGUF holds of such a BPE. "
            "Give --tokenizer_path the tokenizer.model it was made from."
        )
    return {token: -float(rank) for rank, token in enumerate(made)}
