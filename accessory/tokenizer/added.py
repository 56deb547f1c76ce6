"""A tokenizer with more tokens than its checkpoint has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from accessory.errors import TokenizerError
from accessory.tokenizer.base import StatedTokenizer
from accessory.tokenizer.special import NEW_TOKENS, Added


def with_added_tokens(tokenizer: StatedTokenizer, tokens: Sequence[str]) -> StatedTokenizer:
    """The same tokenizer with `tokens` behind its vocabulary, in this order; text that spells one becomes its id.

    Added tokens that it has already stay what they are; control tokens among them are still not matched in text. Saving
    keeps all. Raises TokenizerError for an empty token, or one that is an ordinary token of the vocabulary.
    """
    if bad := [token for token in tokens if not isinstance(token, str) or not token.strip()]:
        raise TokenizerError(f"An added token is {bad[0]!r}; expected a text that is not blank.")
    known = {*tokenizer.special.new, *(token.content for token in tokenizer.added_tokens().values())}
    new = [token for token in dict.fromkeys(tokens) if token not in known]
    if taken := next((token for token in new if tokenizer.token_id(token) is not None), None):
        raise TokenizerError(f"{tokenizer.source}: {taken!r} is an ordinary token of it; expected new ones.")
    if not new:
        return tokenizer
    special = tokenizer.special
    ids = {tokenizer.vocab_size + place: Added(token, special=False) for place, token in enumerate(new)}
    config = {**special.config, NEW_TOKENS: [*special.new, *new]}
    return tokenizer.with_special(replace(special, added=special.added | ids, config=config))
