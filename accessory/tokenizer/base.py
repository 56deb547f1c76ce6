"""The interface of all tokenizers."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Literal

from accessory.errors import TokenizerError
from accessory.tokenizer.special import NEW_TOKENS, Added, SpecialTokens, further_names, write_special_tokens

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


class StatedTokenizer(Tokenizer):
    """A tokenizer with special tokens as the files beside its vocabulary state them (`special`)."""

    special: SpecialTokens
    hint: str = ""
    """What else to say where a file names a token that the vocabulary lacks."""
    _added: dict[int, Added]

    @abstractmethod
    def token(self, token_id: int) -> str | None:
        """How the token of that id is spelled; None for a gap in the vocabulary."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of the token that is spelled so, or None."""

    @abstractmethod
    def usual_start_ids(self) -> tuple[int, ...]:
        """The ids that a document starts with unless a file says whether BOS is one of them."""

    @abstractmethod
    def with_special(self, special: SpecialTokens) -> StatedTokenizer:
        """The same vocabulary with other special tokens."""

    def with_added_tokens(self, tokens: Sequence[str]) -> StatedTokenizer:
        """The same with `tokens` behind its vocabulary, in this order; text that spells one becomes its id.

        Added tokens that it has already stay what they are; control tokens among them are still not matched in text.
        Saving keeps all. Raises TokenizerError for an empty token, or one that is an ordinary token of the vocabulary.
        """
        if bad := [token for token in tokens if not isinstance(token, str) or not token.strip()]:
            raise TokenizerError(f"An added token is {bad[0]!r}; expected a text that is not blank.")
        special = self.special
        known = {*special.new, *(token.content for token in self.added_tokens().values())}
        new = [token for token in dict.fromkeys(tokens) if token not in known]
        if taken := next((token for token in new if self.token_id(token) is not None), None):
            raise TokenizerError(f"{self.source}: {taken!r} is an ordinary token of it; expected new ones.")
        if not new:
            return self
        ids = {self.vocab_size + place: Added(token, special=False) for place, token in enumerate(new)}
        config = {**special.config, NEW_TOKENS: [*special.new, *new]}
        return self.with_special(replace(special, added=special.added | ids, config=config))

    def special_names(self) -> dict[str, str]:
        """See `Tokenizer.special_names`."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        own = {key: self.token(token_id) for key, token_id in ids.items() if token_id is not None}
        return {**further_names(self.special.config), **own}

    def write_special(self, directory: Path, config: dict, added: Mapping[int, Added]) -> None:
        """Write tokenizer_config.json, which is `config` and what `special` came to, and the ids that end an answer.

        `added` are the tokens that the vocabulary's own file does not hold.
        """
        write_special_tokens(
            directory,
            config,
            bos=None if self.bos_id is None else self.token(self.bos_id),
            eos=self.token(self.eos_id),
            add_bos=self.bos_id in self.start_ids,
            stop_ids=(self.eos_id, *sorted(self.stop_ids - {self.eos_id})),
            added=added,
        )

    def _set_special(self, definition: bytes, *, bos: int | None = None, eos: int | None = None) -> None:
        """Set the special ids, the chat template and the fingerprint; everything else is set already.

        `bos` and `eos` are the ids that the vocabulary itself gives. Raises TokenizerError for a BOS or EOS that it
        does not hold. Such ids among `special.stop_ids` are left out: a config.json may speak of padded rows.
        """
        special = self.special
        eos_id = self._resolve("eos_token", special.eos, eos, special.eos_id)
        if eos_id is None:
            raise TokenizerError(
                f"{self.source}: neither it nor a file beside it names the end of a document; expected 'eos_token' in "
                "tokenizer_config.json or 'eos_token_id' in config.json."
            )
        self.eos_id = eos_id
        self.bos_id = None if special.no_bos else self._resolve("bos_token", special.bos, bos, special.bos_id)
        self.start_ids = choose_start_ids(self.usual_start_ids(), self.bos_id, special.add_bos)
        self.stop_ids = frozenset({eos_id, *(token_id for token_id in special.stop_ids if self._holds(token_id))})
        self.chat_template = default_template(special.config, self.source)
        settings = [type(self).__name__, self.bos_id, eos_id, self.start_ids, sorted(self.stop_ids), *special.new]
        self.fingerprint = hashlib.sha256(definition + json.dumps(settings).encode()).hexdigest()

    def _added_definition(self) -> bytes:
        return json.dumps(sorted((token_id, astuple(token)) for token_id, token in self._added.items())).encode()

    def _holds(self, token_id: int) -> bool:
        return 0 <= token_id < self.vocab_size

    def _resolve(self, key: str, name: str | None, own: int | None, stated: int | None) -> int | None:
        """A special id: of the token that a file names, else the vocabulary's own, else the id that a file gives."""
        found = stated if own is None else own
        if name is not None:
            found = self.token_id(name)
            if found is None:
                said = f"{self.source}: tokenizer_config.json names {key} {name!r}, which is no token of it."
                raise TokenizerError(said + self.hint)
        elif found is not None and not (self._holds(found) and self.token(found) is not None):
            raise TokenizerError(
                f"{self.source}: config.json gives {key} the id {found}, which is no token of it; expected an id of "
                f"the vocabulary, 0 to {self.vocab_size - 1}."
            )
        return found


def choose_start_ids(usual: tuple[int, ...], bos_id: int | None, add_bos: bool | None) -> tuple[int, ...]:
    """Ids that start a document: the family's `usual` ones, with or without BOS where a file states it (`add_bos`)."""
    if add_bos is None or bos_id is None or (bos_id in usual) == add_bos:
        return usual
    return (bos_id, *usual) if add_bos else tuple(token_id for token_id in usual if token_id != bos_id)
