"""A tokenizer as the fields of a GGUF file; `gguf_vocab.open_gguf` is the way back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sentencepiece.sentencepiece_model_pb2 import TrainerSpec

from accessory.errors import TokenizerError
from accessory.tokenizer.base import StatedTokenizer
from accessory.tokenizer.gguf_byte_fallback import (
    BLANK,
    BYTE,
    is_byte_fallback,
    merge_scores,
    sentencepiece_beside,
    space_prefix,
)
from accessory.tokenizer.gguf_vocab import TokenType
from accessory.tokenizer.hf_json import JsonTokenizer
from accessory.tokenizer.pre_tokenization import PRE_TOKENIZATIONS, WRITTEN, merges_of, pre_tokenization_name
from accessory.tokenizer.spm import CHATGLM_START, SentencePieceTokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

_KEY = "tokenizer.ggml."
_HINT = "Write the model in another format, or give another form of its tokenizer."
Value = str | bool | int | float | bytes | list[str] | list[int] | list[float]


def vocabulary_fields(tokenizer: SentencePieceTokenizer | JsonTokenizer, rows: int) -> dict[str, Value]:
    """The `tokenizer.*` fields that describe a tokenizer in the GGUF file of an embedding with `rows` rows.

    Rows beyond the vocabulary are listed as unused tokens `[PAD<id>]`. Of the ids that end an answer the format has
    room for EOS and two more; the highest others are left out.
    Raises TokenizerError for a tokenizer that the format has no words for, and for fewer rows than tokens.
    """
    if rows < tokenizer.vocab_size:
        raise TokenizerError(f"The model has {rows} embedding rows; expected {tokenizer.vocab_size} or more.")
    if isinstance(tokenizer, SentencePieceTokenizer):
        fields = _sentencepiece(tokenizer, rows)
    else:
        pipeline = tokenizer.pipeline()
        fields = (_like_llama_2 if is_byte_fallback(pipeline) else _byte_level)(tokenizer, pipeline, rows)
    return fields | _special_fields(tokenizer)


def add_fields(writer: GGUFWriter, fields: dict[str, Value]) -> None:
    """Hand fields to a `gguf.GGUFWriter`, each as the type the format has for it."""
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value:  # the library refuses an empty array
            writer.add_array(key, value)


def stop_names(tokenizer: StatedTokenizer) -> dict[str, int]:
    """The ids that end an answer, by the names the format has for them: EOS and two more."""
    others = sorted(tokenizer.stop_ids - {tokenizer.eos_id})
    return dict(zip(("eos", "eot", "eom"), (tokenizer.eos_id, *others), strict=False))


def _special_fields(tokenizer: SentencePieceTokenizer | JsonTokenizer) -> dict[str, Value]:
    fields: dict[str, Value] = {f"{_KEY}add_bos_token": tokenizer.bos_id in tokenizer.start_ids}
    if tokenizer.bos_id is not None:
        fields[f"{_KEY}bos_token_id"] = tokenizer.bos_id
    fields |= {f"{_KEY}{name}_token_id": token_id for name, token_id in stop_names(tokenizer).items()}
    if tokenizer.chat_template is not None:
        fields["tokenizer.chat_template"] = tokenizer.chat_template
    return fields


def _sentencepiece(tokenizer: SentencePieceTokenizer, rows: int) -> dict[str, Value]:
    proto, source = tokenizer.proto, tokenizer.source
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != TrainerSpec.BPE or trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise TokenizerError(
            f"{source}: is not a sentencepiece model of merges (BPE) with blanks before words, which is all that GGUF "
            f"has words for. {_HINT}"
        )
    types = [piece.type for piece in proto.pieces]
    # Text is searched for user-defined tokens before its blanks are replaced.
    names = [
        piece.piece.replace(BLANK, " ") if piece.type == TokenType.USER_DEFINED else piece.piece
        for piece in proto.pieces
    ]
    _check_start(tokenizer, CHATGLM_START, names)
    if types.count(TokenType.BYTE) != 256:
        raise TokenizerError(f"{source}: lacks some of the pieces <0x00> to <0xFF>; llama.cpp needs all 256. {_HINT}")
    return {
        **_tokens("llama", "default", dict(enumerate(names)), dict(enumerate(types)), rows),
        f"{_KEY}scores": [float(piece.score) for piece in proto.pieces] + [0.0] * (rows - len(names)),
        f"{_KEY}add_space_prefix": normalizer.add_dummy_prefix,
        f"{_KEY}remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
        f"{_KEY}precompiled_charsmap": normalizer.precompiled_charsmap,
        f"{_KEY}unknown_token_id": types.index(TokenType.UNKNOWN),
    }


def _byte_level(tokenizer: JsonTokenizer, pipeline: dict, rows: int) -> dict[str, Value]:
    source, model = tokenizer.source, pipeline["model"]
    names, types = _names_and_types(tokenizer, pipeline)
    start_tokens = tuple(names.get(token_id, "") for token_id in tokenizer.start_ids)
    pre = pre_tokenization_name(pipeline, start_tokens) if model.get("type") == "BPE" and not _odd(model) else None
    if pre is None:
        raise TokenizerError(
            f"{source}: cuts text in a way that GGUF has no name for; expected a byte-level BPE that cuts like one of "
            f"{', '.join(WRITTEN)}. {_HINT}"
        )
    _check_start(tokenizer, PRE_TOKENIZATIONS[pre].start_tokens, names)
    if not model["merges"]:
        raise TokenizerError(f"{source}: has no merges; llama.cpp loads no byte-level vocabulary without. {_HINT}")
    return {
        **_tokens("gpt2", pre, names, types, rows),
        f"{_KEY}merges": [" ".join(merge) for merge in merges_of(model)],
    }


def _like_llama_2(tokenizer: JsonTokenizer, pipeline: dict, rows: int) -> dict[str, Value]:
    """Fields of a byte-fallback BPE, from its merges, or from the tokenizer.model beside it if these give no scores."""
    try:
        return _byte_fallback(tokenizer, pipeline, rows)
    except TokenizerError:
        beside = sentencepiece_beside(tokenizer)
        if beside is None:
            raise
        return _sentencepiece(beside, rows)


def _byte_fallback(tokenizer: JsonTokenizer, pipeline: dict, rows: int) -> dict[str, Value]:
    source, model = tokenizer.source, pipeline["model"]
    if _odd(model):
        raise TokenizerError(f"{source}: has settings that GGUF cannot state ({', '.join(_odd(model))}). {_HINT}")
    names, types = _names_and_types(tokenizer, pipeline)
    _check_start(tokenizer, (), names)
    prefix = space_prefix(pipeline, source)
    control = {names[token_id] for token_id, kind in types.items() if kind == TokenType.CONTROL}
    scores = merge_scores(model, control, source)
    unknown = model.get("unk_token") or tokenizer.special_names().get("unk_token", "<unk>")
    for token_id, name in names.items():
        if name == unknown:
            types[token_id] = TokenType.UNKNOWN
        elif BYTE.fullmatch(name):
            types[token_id] = TokenType.BYTE
    if TokenType.UNKNOWN not in types.values():
        raise TokenizerError(
            f"{source}: has no unknown token {unknown!r}, which a `llama` vocabulary of GGUF needs. {_HINT}"
        )
    return {
        **_tokens("llama", "default", names, types, rows),
        f"{_KEY}scores": [scores.get(names.get(row), 0.0) for row in range(rows)],
        f"{_KEY}add_space_prefix": prefix != "never",
        f"{_KEY}remove_extra_whitespaces": False,
        f"{_KEY}unknown_token_id": next(token_id for token_id, kind in types.items() if kind == TokenType.UNKNOWN),
    }


def _names_and_types(tokenizer: JsonTokenizer, pipeline: dict) -> tuple[dict[int, str], dict[int, int]]:
    """Id -> name and id -> `TokenType` of all tokens of a BPE; empty for a model of another kind."""
    model = pipeline["model"]
    names = {token_id: token for token, token_id in model["vocab"].items()} if model.get("type") == "BPE" else {}
    types = dict.fromkeys(names, TokenType.NORMAL)
    for token in pipeline["added_tokens"]:
        names[token["id"]] = token["content"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    for token_id in (tokenizer.stop_ids | {tokenizer.bos_id}) & names.keys():
        types[token_id] = TokenType.CONTROL
    return names, types


def _odd(model: dict) -> list[str]:
    """Settings of a BPE model that GGUF cannot state."""
    settings = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")
    return [name for name in settings if model.get(name)]


def _check_start(tokenizer: SentencePieceTokenizer | JsonTokenizer, known: tuple[str, ...], names) -> None:
    """Raise TokenizerError if documents start with anything but nothing, BOS, or the tokens `known` of the family."""
    start_ids = tokenizer.start_ids
    if start_ids not in ((), (tokenizer.bos_id,)) and tuple(names[token_id] for token_id in start_ids) != known:
        found = ", ".join(repr(names[token_id]) for token_id in start_ids)
        raise TokenizerError(f"{tokenizer.source}: documents open with {found}, for which GGUF has no words. {_HINT}")


def _tokens(kind: str, pre: str, names: dict[int, str], types: dict[int, int], rows: int) -> dict[str, Value]:
    """The kind of vocabulary, how text is split before it, tokens and their types; ids without a token are padding."""
    return {
        f"{_KEY}model": kind,
        f"{_KEY}pre": pre,
        f"{_KEY}tokens": [names.get(row, f"[PAD{row}]") for row in range(rows)],
        f"{_KEY}token_type": [types.get(row, TokenType.UNUSED) for row in range(rows)],
    }
