"""A sentencepiece model as a pipeline of the `tokenizers` library, the form in which transformers reads it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from accessory.errors import TokenizerError
from accessory.tokenizer.special import Added
from accessory.tokenizer.spm import BLANK, SentencePieceTokenizer

EXTRA_BLANKS = (" {2,}", r"\A ", r"▁+\z")
"""Regular expressions of the blanks that a model may remove: several in a row (one stays), leading, trailing."""
_WHOLE = -0.1  # score that sentencepiece's Unigram gives a user-defined piece
_CHECKED = 64  # pieces, or blanks at most, in a text that checks a pipeline
_HINT = "Write the model in another format, or give another form of its tokenizer."
_Piece = ModelProto.SentencePiece


def pipeline_of(tokenizer: SentencePieceTokenizer) -> dict:
    """The tokenizer.json (parsed), without post-processor, that cuts text as `tokenizer` does.

    Raises TokenizerError for a model that the library cannot imitate: one with blanks behind words, one of
    `"legacy": false` that rewrites what a text begins with, or one whose own pieces it would cut otherwise.
    """
    proto, spec = tokenizer.proto, tokenizer.proto.normalizer_spec
    if proto.trainer_spec.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        raise TokenizerError(
            f"{tokenizer.source}: does not mark blanks before words, as sentencepiece models usually do; a "
            f"tokenizer.json cannot state anything else. {_HINT}"
        )
    if spec.add_dummy_prefix and not tokenizer.legacy and (spec.remove_extra_whitespaces or spec.precompiled_charsmap):
        raise TokenizerError(
            f'{tokenizer.source}: normalizes text and puts a blank before it, but, by "legacy": false, not behind a '
            f"control token; a tokenizer.json cannot state that. {_HINT}"
        )
    pipeline = Tokenizer(_model(tokenizer))
    pipeline.normalizer = normalizers.Sequence(_normalizers(proto, tokenizer.legacy))
    if steps := _pre_tokenizers(tokenizer):
        pipeline.pre_tokenizer = pre_tokenizers.Sequence(steps)
    joining = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    pipeline.decoder = decoders.Sequence([*joining, *([decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else [])])
    unknown = {index: Added(piece.piece) for index, piece in enumerate(proto.pieces) if piece.type == _Piece.UNKNOWN}
    added = sorted((unknown | tokenizer.control_tokens() | tokenizer.cut_first).items())
    stated = [{"id": token_id, **asdict(token)} for token_id, token in added]
    made = {**json.loads(pipeline.to_str()), "added_tokens": stated}
    _check(made, tokenizer)
    return made


def _model(tokenizer: SentencePieceTokenizer) -> models.Model:
    """The model with all pieces. In a BPE no merge makes a user-defined piece: `_pre_tokenizers` cuts it out whole.

    In a Unigram such pieces score higher than any learned one, as in sentencepiece.
    """
    proto = tokenizer.proto
    (unknown,) = (index for index, piece in enumerate(proto.pieces) if piece.type == _Piece.UNKNOWN)
    fallback = proto.trainer_spec.byte_fallback
    if proto.trainer_spec.model_type == TrainerSpec.UNIGRAM:
        entries = [(piece.piece, piece.score if piece.type == _Piece.NORMAL else _WHOLE) for piece in proto.pieces]
        return models.Unigram(entries, unknown, fallback)
    return models.BPE(
        {piece.piece: index for index, piece in enumerate(proto.pieces)},
        _merges(proto),
        unk_token=proto.pieces[unknown].piece,
        fuse_unk=True,
        byte_fallback=fallback,
        ignore_merges=bool(_names(tokenizer, _Piece.USER_DEFINED)),
    )


def _merges(proto: ModelProto) -> list[tuple[str, str]]:
    """Every way to put a piece together of two, in the order in which sentencepiece prefers them.

    It merges the pair whose piece scores highest, among equals the leftmost. LLaMA's runs of blanks have equal scores;
    there the leftmost pair has the longest left part, since what is merged already stands on the left.
    """
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _Piece.NORMAL}
    ways = (
        (-score, -cut, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    )
    return [(left, right) for _, _, left, right in sorted(ways)]


def _normalizers(proto: ModelProto, legacy: bool) -> list[normalizers.Normalizer]:
    spec, steps = proto.normalizer_spec, []
    several, leading, trailing = (Regex(pattern) for pattern in EXTRA_BLANKS)
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(several, " "), normalizers.Replace(leading, "")]
    if spec.add_dummy_prefix and legacy:
        steps.append(normalizers.Prepend(BLANK))
    steps.append(normalizers.Replace(" ", BLANK))
    if spec.remove_extra_whitespaces:  # a text that ends with the letter for blanks loses it, too
        steps.append(normalizers.Replace(trailing, ""))
    return steps


def _pre_tokenizers(tokenizer: SentencePieceTokenizer) -> list[pre_tokenizers.PreTokenizer]:
    proto, steps = tokenizer.proto, []
    if proto.normalizer_spec.add_dummy_prefix and not tokenizer.legacy:
        # Only Metaspace knows where a text begins. It adds no blank before a blank, but by now blanks are ▁.
        steps.append(pre_tokenizers.Metaspace(" ", "first", split=False))
        steps.append(pre_tokenizers.Metaspace(BLANK, "never", split=False))
    # A text that spells a special piece would become that piece in a Unigram; in a BPE, too, if user-defined pieces are
    # cut out and it stands alone between them. So it is cut where sentencepiece cuts it.
    kinds = (_Piece.CONTROL, _Piece.UNKNOWN, _Piece.BYTE, _Piece.UNUSED)
    names, whole = _names(tokenizer, *kinds), _alternatives(_names(tokenizer, _Piece.USER_DEFINED))
    apart = "|".join(_in_two(name, tokenizer) for name in names)
    if proto.trainer_spec.model_type == TrainerSpec.UNIGRAM:
        steps.append(pre_tokenizers.Split(Regex(apart), "isolated"))
    elif whole:
        alone = rf"(?<=\A|{whole})(?=(?:{_alternatives(names)})(?:\z|{whole}))(?:{apart})"
        steps.append(pre_tokenizers.Split(Regex(f"{whole}|{alone}"), "isolated"))
    return steps


def _in_two(name: str, tokenizer: SentencePieceTokenizer) -> str:
    """A regular expression that matches the first piece of the text `name`, if the rest of `name` follows."""
    first = tokenizer.proto.pieces[tokenizer.encode(name, continuation=True)[0]]
    length = len(first.piece) if name.startswith(first.piece) else 1
    return f"{re.escape(name[:length])}(?={re.escape(name[length:])})"


def _names(tokenizer: SentencePieceTokenizer, *kinds: int) -> list[str]:
    """The pieces of some types that sentencepiece itself looks for in text, longest first as it does."""
    own = (piece for index, piece in enumerate(tokenizer.proto.pieces) if index not in tokenizer.cut_first)
    return sorted((piece.piece for piece in own if piece.type in kinds), key=len, reverse=True)


def _alternatives(names: list[str]) -> str:
    return "|".join(map(re.escape, names))


def _check(made: dict, tokenizer: SentencePieceTokenizer) -> None:
    """Compare both on texts of all pieces and of blanks, since the library cannot do all that sentencepiece does."""
    pipeline = Tokenizer.from_str(json.dumps(made))
    pipeline.encode_special_tokens = True
    pieces = _names(tokenizer, _Piece.NORMAL, _Piece.USER_DEFINED)
    texts = ["".join(pieces[start : start + _CHECKED]) for start in range(0, len(pieces), _CHECKED)]
    for text in (*texts, *(f"x{BLANK * count}y" for count in range(_CHECKED))):
        plain = text.replace(BLANK, " ")
        if pipeline.encode(plain, add_special_tokens=False).ids != tokenizer.encode(plain):
            raise TokenizerError(
                f"{tokenizer.source}: as a tokenizer.json it would cut {plain!r} otherwise than sentencepiece. {_HINT}"
            )
