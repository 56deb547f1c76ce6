"""Texts of tasks to token ids, by either of two protocols that published figures follow.

0.4: as the lm-eval harness has done since version 0.4: a context starts as a document does (with BOS where the
tokenizer adds one), and is tokenized together with its continuation. 0.3: the two apart and no BOS, as GreenBit's
figures were made with version 0.3. Figures compare within one protocol only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from accessory.errors import DataError, check_known
from accessory.eval.scoring import Continuation
from accessory.tokenizer import Tokenizer

PROTOCOLS = ("0.4", "0.3")


class Encoding:
    """A tokenizer under a protocol. prefix: the id after which a text without context is scored."""

    def __init__(self, tokenizer: Tokenizer, protocol: str = "0.4") -> None:
        """Raises `ConfigError` for another protocol than `PROTOCOLS`."""
        check_known("--protocol", protocol, PROTOCOLS)
        self._tokenizer, self._joint = tokenizer, protocol == "0.4"
        has_bos = self._joint and tokenizer.bos_id is not None
        self.prefix: int = tokenizer.bos_id if has_bos else tokenizer.eos_id

    def document(self, text: str) -> list[int]:
        """Ids of a text from its start."""
        return self._documents([text])[text]

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Continuation]:
        """(context, continuation) texts to ids. Raises `DataError` where nothing is left to score."""
        pairs = [_without_trailing_spaces(*pair) if self._joint and pair[0] else pair for pair in pairs]
        wholes = (context + more for context, more in pairs if context) if self._joint else ()
        documents = self._documents([*(context for context, _ in pairs if context), *wholes])
        apart = self._ids(more for context, more in pairs if not (context and self._joint))
        found = []
        for context, more in pairs:
            if context and self._joint:
                before = documents[context]
                given = Continuation(before, documents[context + more][len(before) :])
            elif context:
                given = Continuation(documents[context], apart[more])
            else:
                given = self._without_context(apart[more])
            if not given.context or not given.tokens:
                raise DataError(
                    f"There is nothing to score after {context[-60:]!r} in {more!r}: it has no token of its own."
                )
            found.append(given)
        return found

    def _without_context(self, tokens: list[int]) -> Continuation:
        if self._joint and tokens[:1] == [self.prefix]:
            return Continuation(tokens[:1], tokens[1:])
        return Continuation([self.prefix], tokens)

    def _documents(self, texts: Iterable[str]) -> dict[str, list[int]]:
        start = list(self._tokenizer.start_ids) if self._joint else []
        return {text: start + ids for text, ids in self._ids(texts).items()}

    def _ids(self, texts: Iterable[str]) -> dict[str, list[int]]:
        once = list(dict.fromkeys(texts))
        return dict(zip(once, self._tokenizer.encode_batch(once), strict=True))


def _without_trailing_spaces(context: str, continuation: str) -> tuple[str, str]:
    """Spaces at a context's end belong to the word that follows."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
