"""Sentencepiece vocabularies: `tokenizer.model`, or a model put together in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from accessory.errors import TokenizerError
from accessory.tokenizer.base import Tokenizer, looks_like_control
from accessory.tokenizer.sniff import what_is
from accessory.tokenizer.special import SpecialTokens, write_special_tokens

FILE_NAME = "tokenizer.model"
_EXPECTED = "expected a sentencepiece model"
_Piece = ModelProto.SentencePiece


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, with BOS, EOS and unknown as the model states them unless `special` says otherwise."""

    def __init__(self, definition: bytes, special: SpecialTokens | None = None, *, source: str = FILE_NAME) -> None:
        """`definition` is a serialized ModelProto; `source` is named in the TokenizerError of an unusable one."""
        special = special or SpecialTokens()
        proto = _parse(definition, source)
        self._definition = definition
        self._config = special.config
        self._pieces = [piece.piece for piece in proto.pieces]
        self.vocab_size = len(self._pieces)
        stated_bos, stated_eos = proto.trainer_spec.bos_id, proto.trainer_spec.eos_id
        ids = {piece: index for index, piece in enumerate(self._pieces)}
        eos_id = _resolve(ids, "eos_token", special.eos, stated_eos, special.eos_id, source)
        if eos_id is None:
            raise TokenizerError(
                f"{source}: the model has no end-of-document piece and no file beside it names one; expected "
                "'eos_token' in tokenizer_config.json or 'eos_token_id' in config.json."
            )
        bos_id = None if special.no_bos else _resolve(ids, "bos_token", special.bos, stated_bos, special.bos_id, source)
        add_bos = True if special.add_bos is None else special.add_bos
        self._set_special(bos_id=bos_id, eos_id=eos_id, add_bos=add_bos, definition=definition, source=source)
        _hide_control_pieces(proto, {bos_id, eos_id})
        self._processor = _load(proto, source)
        self._continuing = _load(_without_leading_space(proto), source)

    def encode_batch(self, texts: Sequence[str], *, continuation: bool = False, threads: int = 1) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        processor = self._continuing if continuation else self._processor
        return processor.encode(list(texts), num_threads=threads)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return self._processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def save(self, directory: Path) -> None:
        """Write tokenizer.model as it was read, and tokenizer_config.json."""
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / "tokenizer.json").exists():
            raise TokenizerError(f"{directory} holds a tokenizer.json, which would be read in place of {FILE_NAME}.")
        (directory / FILE_NAME).write_bytes(self._definition)
        bos = None if self.bos_id is None else self._pieces[self.bos_id]
        write_special_tokens(directory, self._config, bos=bos, eos=self._pieces[self.eos_id], add_bos=self.add_bos)


def open_sentencepiece(path: Path, special: SpecialTokens) -> SentencePieceTokenizer:
    """Read a `.model` file. Raises TokenizerError saying what the file is where it is not a sentencepiece model."""
    try:
        definition = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: found {what_is(path)}; {_EXPECTED}.") from error
    return SentencePieceTokenizer(definition, special, source=str(path))


def _parse(definition: bytes, source: str) -> ModelProto:
    """The model, checked for what sentencepiece itself only notices by crashing or in words nobody understands."""
    found = what_is(Path(source)) if Path(source).is_file() else f"{len(definition)} bytes"
    refusal = TokenizerError(f"{source}: found {found}; {_EXPECTED}, whole and undamaged.")
    proto = ModelProto()
    try:
        proto.ParseFromString(definition)
    except (DecodeError, RuntimeError) as error:
        raise refusal from error
    unknown = [index for index, piece in enumerate(proto.pieces) if piece.type == _Piece.UNKNOWN]
    if len(unknown) != 1 or not all(piece.piece for piece in proto.pieces):
        raise refusal
    return proto


def _resolve(
    ids: dict[str, int], key: str, name: str | None, own: int, configured: int | None, source: str
) -> int | None:
    """A special id: the name a file gives it, else the model's own, else the id a file gives it."""
    if name is not None:
        if name not in ids:
            raise TokenizerError(
                f"{source}: tokenizer_config.json names {key} {name!r}, which is no piece of this model; expected one "
                "of its pieces. A vocabulary with added tokens is read from its tokenizer.json."
            )
        return ids[name]
    # The id's default in the format is 1 or 2 whether or not there is such a piece.
    return own if 0 <= own < len(ids) else configured


def _hide_control_pieces(proto: ModelProto, special_ids: set[int | None]) -> None:
    """Make BOS, EOS and chat markers control pieces, which no text matches and which decode to none. Ids stay."""
    for index, piece in enumerate(proto.pieces):
        marker = piece.type == _Piece.USER_DEFINED and looks_like_control(piece.piece)
        if marker or (index in special_ids and piece.type in (_Piece.NORMAL, _Piece.USER_DEFINED)):
            piece.type = _Piece.CONTROL


def _without_leading_space(proto: ModelProto) -> ModelProto:
    """The same model for text that continues another: no made-up leading space, and a real one is kept."""
    continuing = ModelProto()
    continuing.CopyFrom(proto)
    continuing.normalizer_spec.add_dummy_prefix = False
    continuing.normalizer_spec.remove_extra_whitespaces = False
    return continuing


def _load(proto: ModelProto, source: str) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except (RuntimeError, ValueError) as error:
        raise TokenizerError(f"{source}: {_EXPECTED}, but sentencepiece cannot use it ({error}).") from error
