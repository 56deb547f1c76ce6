"""Sentencepiece vocabularies: `tokenizer.model`, or a model put together in memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from accessory.errors import TokenizerError
from accessory.tokenizer.base import Place, StatedTokenizer, looks_like_control
from accessory.tokenizer.sniff import what_is
from accessory.tokenizer.special import ADDED_FILE, Added, SpecialTokens, write_object
from accessory.tokenizer.trial import try_in_subprocess

FILE_NAME = "tokenizer.model"
CHATGLM_CLASS = "ChatGLMTokenizer"
CHATGLM_START = ("[gMASK]", "sop")
_CHATGLM_TOKENS = (
    "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"
)  # fmt: skip
_WIDEST_GAP = 1024  # ids that a list of added tokens may leave out
_EXPECTED = "expected a sentencepiece model"
BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
_Piece = ModelProto.SentencePiece


class SentencePieceTokenizer(StatedTokenizer):
    """A sentencepiece model, with BOS, EOS and unknown as the model states them unless `special` says otherwise.

    `definition` is the model as it was read, `proto` the one it works with: added tokens are pieces of it, and control
    tokens are control pieces. `special` is what the files beside it state; its key `legacy` says whether a space is put
    before text that follows a control token. Without that key it is, as in Meta's code (which encodes each message by
    itself), llama.cpp and transformers before version 5.
    """

    hint = " A vocabulary with added tokens is read from its tokenizer.json."

    def __init__(self, definition: bytes, special: SpecialTokens | None = None, *, source: str = FILE_NAME) -> None:
        """`definition` is a serialized ModelProto; `source` is named in the TokenizerError of an unusable one."""
        special = special or SpecialTokens()
        proto = _parse(definition, source)
        self.definition, self.special = definition, special
        self.legacy = special.config.get("legacy") is not False
        self.source, self._added = source, _all_added(special, proto)
        add_pieces(proto, self._added, source)
        self._pieces = [piece.piece for piece in proto.pieces]
        self._ids = {piece: index for index, piece in enumerate(self._pieces)}
        self.vocab_size = len(self._pieces)
        # These ids' defaults in the format are 1 and 2, whether or not there is such a piece.
        bos, eos = (i if self._holds(i) else None for i in (proto.trainer_spec.bos_id, proto.trainer_spec.eos_id))
        settings = self._added_definition() + (b"" if self.legacy else b"not legacy")
        self._set_special(definition + settings, bos=bos, eos=eos)
        _hide_control_pieces(proto, {self.bos_id, self.eos_id}, special.new)
        self.proto = proto
        self._silent = {index for index, piece in enumerate(proto.pieces) if piece.type == _Piece.UNUSED}
        try_in_subprocess("sentencepiece", proto.SerializeToString(deterministic=True), f"{source}: {_EXPECTED}")
        self.cut_first = {
            index: token for index, token in self._added.items() if proto.pieces[index].type == _Piece.USER_DEFINED
        }
        """Added tokens that text may spell: it is cut at them before sentencepiece sees it, as other libraries do."""
        names = sorted((token.content for token in self.cut_first.values()), key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        self._processor = _load(proto, source)
        self._continuing = _load(_without_leading_space(proto), source)

    def encode_batch(self, texts: Sequence[str], *, continuation: bool = False, threads: int = 1) -> list[list[int]]:
        """See `Tokenizer.encode_batch`."""
        if self.cut_first:
            return [self.encode_segment(text, "continued" if continuation else "start") for text in texts]
        processor = self._continuing if continuation else self._processor
        return processor.encode(list(texts), num_threads=threads)

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        return self._processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size and i not in self._silent])

    def control_tokens(self) -> dict[int, Added]:
        """See `Tokenizer.control_tokens`: the control pieces."""
        flags = {token_id: (token.lstrip, token.rstrip) for token_id, token in self._added.items()}
        return {
            index: Added(piece.piece, True, *flags.get(index, ()))
            for index, piece in enumerate(self.proto.pieces)
            if piece.type == _Piece.CONTROL
        }

    def added_tokens(self) -> dict[int, Added]:
        """See `Tokenizer.added_tokens`: the control pieces and the user-defined ones."""
        own = {index: piece for index, piece in enumerate(self.proto.pieces) if piece.type == _Piece.USER_DEFINED}
        return self.control_tokens() | {index: Added(piece.piece, special=False) for index, piece in own.items()}

    def token(self, token_id: int) -> str:
        """See `StatedTokenizer.token`."""
        return self._pieces[token_id]

    def token_id(self, token: str) -> int | None:
        """See `StatedTokenizer.token_id`."""
        return self._ids.get(token)

    def usual_start_ids(self) -> tuple[int, ...]:
        """See `StatedTokenizer.usual_start_ids`: BOS if there is one, but ChatGLM's where the files name its class."""
        if self.special.config.get("tokenizer_class") == CHATGLM_CLASS:
            return tuple(self._ids[name] for name in CHATGLM_START)
        return () if self.bos_id is None else (self.bos_id,)

    def with_special(self, special: SpecialTokens) -> SentencePieceTokenizer:
        """See `StatedTokenizer.with_special`."""
        return SentencePieceTokenizer(self.definition, special, source=self.source)

    def encode_segment(self, text: str, place: Place) -> list[int]:
        """See `Tokenizer.encode_segment`."""
        ids, added = [], {token.content: index for index, token in self.cut_first.items()}
        for part in self._cut.split(text):
            if part in added:
                ids.append(added[part])
                place = place if place == "continued" else "behind_control"
            elif part:
                continuing = place == "continued" or (place == "behind_control" and not self.legacy)
                ids += (self._continuing if continuing else self._processor).encode(part)
        return ids

    def save(self, directory: Path) -> None:
        """Write tokenizer.model as it was read, tokenizer_config.json, and the ids that end an answer."""
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / "tokenizer.json").exists():
            raise TokenizerError(f"{directory} holds a tokenizer.json, which would be read in place of {FILE_NAME}.")
        (directory / FILE_NAME).write_bytes(self.definition)
        # Without a class, transformers reads the file in a way that fits no model.
        usual = {"tokenizer_class": "LlamaTokenizer"} if self.proto.trainer_spec.model_type == TrainerSpec.BPE else {}
        self.write_special(directory, {**usual, **self.special.config, "legacy": self.legacy}, self._added)


def open_sentencepiece(path: Path, special: SpecialTokens) -> SentencePieceTokenizer:
    """Read a `.model` file. Raises TokenizerError saying what the file is where it is not a sentencepiece model."""
    try:
        definition = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: found {what_is(path)}; {_EXPECTED}.") from error
    return SentencePieceTokenizer(definition, special, source=str(path))


def write_model_file(directory: Path, definition: bytes, ids: dict[str, int]) -> None:
    """Write tokenizer.model as it was read, and in added_tokens.json those of the tokens `ids` that it lacks.

    For llama.cpp's converter and others that read no tokenizer.json beside it.
    """
    (directory / FILE_NAME).write_bytes(definition)
    try:
        known = len(ModelProto.FromString(definition).pieces)
    except (DecodeError, RuntimeError):  # tiktoken's
        return
    added = {token_id: token for token, token_id in ids.items() if token_id >= known and token != _filler(token_id)}
    if added:
        write_object(directory / ADDED_FILE, {token: token_id for token_id, token in sorted(added.items())})


def _parse(definition: bytes, source: str) -> ModelProto:
    """The model, checked for faults at which sentencepiece itself crashes or gives an unclear error."""
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


def _all_added(special: SpecialTokens, proto: ModelProto) -> dict[int, Added]:
    """The added tokens that files list, and those that ChatGLM's own code, which is not run here, puts behind them."""
    if special.config.get("tokenizer_class") != CHATGLM_CLASS:
        return special.added
    first = len(proto.pieces)
    if any(piece.piece == CHATGLM_START[0] for piece in proto.pieces):  # a GGUF file lists them among its own
        return special.added
    return special.added | {first + place: Added(content) for place, content in enumerate(_CHATGLM_TOKENS)}


def _filler(token_id: int) -> str:
    """The piece for an id that a list of added tokens leaves out."""
    return f"[UNUSED{token_id}]"


def add_pieces(proto: ModelProto, added: dict[int, Added], source: str) -> None:
    """Make every added token a piece at its id: a control piece if special, else user-defined, which text matches.

    An added token takes over a piece that stands at its id; ids between the last piece and it become unused pieces.
    Raises TokenizerError for an id too far off, or a token that two ids would have.
    """
    for token_id, token in sorted(added.items()):
        if token_id >= len(proto.pieces) + _WIDEST_GAP:
            raise TokenizerError(
                f"{source}: a file beside it gives the added token {token.content!r} the id {token_id}; expected ids "
                f"that go on from the {len(proto.pieces)} pieces of the model."
            )
        while len(proto.pieces) <= token_id:
            proto.pieces.add(piece=_filler(len(proto.pieces)), score=0.0, type=_Piece.UNUSED)
        piece = proto.pieces[token_id]
        if piece.type not in (_Piece.UNKNOWN, _Piece.BYTE):
            piece.piece = token.content
            piece.type = _Piece.CONTROL if token.special or piece.type == _Piece.CONTROL else _Piece.USER_DEFINED
    names = Counter(piece.piece for piece in proto.pieces)
    if twice := next((token for token in added.values() if names[token.content] > 1), None):
        raise TokenizerError(f"{source}: the added token {twice.content!r} has two ids; expected one.")


def _hide_control_pieces(proto: ModelProto, special_ids: set[int | None], new: tuple[str, ...]) -> None:
    """Make BOS, EOS and chat markers control pieces, which no text matches and which decode to none. Ids stay.

    Those that a user added (`new`) may be spelled like a marker.
    """
    for index, piece in enumerate(proto.pieces):
        marker = piece.type == _Piece.USER_DEFINED and looks_like_control(piece.piece) and piece.piece not in new
        if marker or (index in special_ids and piece.type in (_Piece.NORMAL, _Piece.USER_DEFINED)):
            piece.type = _Piece.CONTROL


def _without_leading_space(proto: ModelProto) -> ModelProto:
    """The same model for text that continues another: no leading space is added, and none is removed."""
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
