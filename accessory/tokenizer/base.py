"""The one face behind which every vocabulary hides."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from accessory.errors import TokenizerError

# Vocabularies often list chat markers as ordinary user-defined tokens. Text of a data set that spells such a marker
# would then forge a turn, so whatever looks like one is never matched in text.
_CONTROL = re.compile(r"<[|｜].+[|｜]>|</?s>|\[/?INST\]")


def looks_like_control(token: str) -> bool:
    """Whether `token` is spelled like a control marker (`<|im_end|>`, `</s>`, `[INST]`)."""
    return _CONTROL.fullmatch(token) is not None


class Tokenizer(ABC):
    """Encodes text into ids of one vocabulary and decodes them.

    Attributes:
        vocab_size: number of ids the model must have rows for (highest id + 1).
        bos_id: id that opens a document, or None where the vocabulary has none.
        eos_id: id that ends a document.
        add_bos: whether a document starts with `bos_id`.
        fingerprint: sha256 (hex) of everything that defines the tokenizer; equal fingerprints encode equally.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int
    add_bos: bool
    fingerprint: str

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], *, continuation: bool = False, threads: int = 1) -> list[list[int]]:
        """Ids of each text, in order. Never adds BOS or EOS; control tokens spelled in a text stay plain text.

        `continuation=True` says that every text goes on where a preceding one ended, so that no leading space is made
        up for it. `threads` is the number of threads to work with; the result does not depend on it.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Special ids and ids beyond the vocabulary (padded rows of a model) give no text."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the files from which `open_tokenizer(directory)` gives a tokenizer with the same fingerprint."""

    def encode(self, text: str, *, continuation: bool = False) -> list[int]:
        """Ids of one text; see `encode_batch`."""
        return self.encode_batch([text], continuation=continuation)[0]

    def _set_special(self, *, bos_id: int | None, eos_id: int, add_bos: bool, definition: bytes, source: str) -> None:
        """Set the special ids and the fingerprint, after a check that they fit the vocabulary (`vocab_size` is set)."""
        for name, token_id in (("BOS", bos_id), ("EOS", eos_id)):
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                raise TokenizerError(
                    f"{source}: the {name} id is {token_id}; expected an id of the vocabulary, 0 to "
                    f"{self.vocab_size - 1}."
                )
        self.bos_id, self.eos_id, self.add_bos = bos_id, eos_id, add_bos and bos_id is not None
        settings = json.dumps([type(self).__name__, self.bos_id, self.eos_id, self.add_bos])
        self.fingerprint = hashlib.sha256(definition + settings.encode()).hexdigest()
