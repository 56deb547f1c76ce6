"""The interface of all tokenizers."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from accessory.errors import TokenizerError
from accessory.tokenizer.special import NEW_TOKENS, Added

# Vocabularies often list chat markers as ordinary user-defined tokens. Text of a data set that spells such a marker
# would then forge a turn, so whatever looks like one is never matched in text.
_CONTROL = re.compile(r"<[|｜].+[|｜]>|</?s>|\[/?INST\]")

Place = Literal["start", "behind_control", "continued"]
"""Where a segment of a chat stands: first, behind a control token, or where other text ended."""


def looks_like_control(token: str) -> bool:
    """Whether `token` is spelled like a control marker (`<|im_end|>`, `</s>`, `[INST]`)."""
    return _CONTROL.fullmatch(token) is not None


def default_template(config: Mapping[str, object], source: str) -> str | None:
    """The chat template of a tokenizer_config.json, the one named `default` where it lists several; None without any.

    Raises TokenizerError for a value of another shape.
    """
    stated = config.get("chat_template")
    if isinstance(stated, list):
        named = {item.get("name"): item.get("template") for item in stated if isinstance(item, dict)}
        stated = named.get("default", stated)
    if stated is not None and not isinstance(stated, str):
        raise TokenizerError(f"{source}: 'chat_template' is {stated!r}; expected a text, or a list with a 'default'.")
    return stated


class Tokenizer(ABC):
    """Encodes text into ids of one vocabulary and decodes them.

    Attributes:
        vocab_size: number of ids the model must have rows for (highest id + 1).
        bos_id: id of the BOS token, or None where the vocabulary has none.
        eos_id: id that ends a document.
        start_ids: ids that every document starts with: none, BOS, or for GLM `[gMASK]` and `<sop>`.
        stop_ids: ids that end an answer; `eos_id` is one of them.
        chat_template: the checkpoint's Jinja template of a conversation, or None.
        source: the file it was read from, for messages.
        fingerprint: sha256 (hex) of everything that defines the tokenizer; equal fingerprints encode equally.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int
    start_ids: tuple[int, ...]
    stop_ids: frozenset[int]
    chat_template: str | None = None
    source: str
    fingerprint: str

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], *, continuation: bool = False, threads: int = 1) -> list[list[int]]:
        """Ids of each text, in order. Never adds BOS or EOS; control tokens spelled in a text stay plain text.

        Other added tokens (`added_tokens`) that a text spells become their ids.

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

    def control_tokens(self) -> dict[int, Added]:
        """The tokens that a chat template writes as markers, by id."""
        return {}

    def added_tokens(self) -> dict[int, Added]:
        """Id -> token of all that are taken whole: control tokens, and others, which text may spell."""
        return self.control_tokens()

    def special_names(self) -> dict[str, str]:
        """The special tokens a chat template may ask for: `bos_token`, `eos_token` and others there are."""
        return {}

    def encode_segment(self, text: str, place: Place) -> list[int]:
        """Ids of text between the control tokens of a chat, as the library of the vocabulary would cut it there."""
        return self.encode(text, continuation=place != "start")

    def _set_special(
        self,
        *,
        bos_id: int | None,
        eos_id: int,
        definition: bytes,
        source: str,
        start_ids: tuple[int, ...] = (),
        stop_ids: Iterable[int] = (),
        config: Mapping[str, object] | None = None,
    ) -> None:
        """Set the special ids, the template (of `config`) and the fingerprint. `vocab_size` is set already.

        Raises TokenizerError for a BOS or EOS that the vocabulary does not reach. Such `stop_ids` are left out: a
        config.json may speak of the model's padded rows.
        """
        for name, token_id in (("BOS", bos_id), ("EOS", eos_id)):
            if token_id is not None and not 0 <= token_id < self.vocab_size:
                raise TokenizerError(
                    f"{source}: the {name} id is {token_id}; expected an id of the vocabulary, 0 to "
                    f"{self.vocab_size - 1}."
                )
        self.bos_id, self.eos_id, self.start_ids = bos_id, eos_id, start_ids
        self.stop_ids = frozenset({eos_id, *(token_id for token_id in stop_ids if 0 <= token_id < self.vocab_size)})
        self.source, self.chat_template = source, default_template(config or {}, source)
        new = (config or {}).get(NEW_TOKENS) or ()
        settings = json.dumps([type(self).__name__, bos_id, eos_id, start_ids, sorted(self.stop_ids), *new])
        self.fingerprint = hashlib.sha256(definition + settings.encode()).hexdigest()

    @property
    def _ordered_stop_ids(self) -> tuple[int, ...]:
        """The stop ids as files list them: EOS first."""
        return (self.eos_id, *sorted(self.stop_ids - {self.eos_id}))


def choose_start_ids(usual: tuple[int, ...], bos_id: int | None, add_bos: bool | None) -> tuple[int, ...]:
    """Ids that start a document: the family's `usual` ones, with or without BOS where a file states it (`add_bos`)."""
    if add_bos is None or bos_id is None or (bos_id in usual) == add_bos:
        return usual
    return (bos_id, *usual) if add_bos else tuple(token_id for token_id in usual if token_id != bos_id)
