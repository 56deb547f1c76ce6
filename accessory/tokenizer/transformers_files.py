"""Writes a tokenizer as files with which transformers, in any version, encodes text as we do."""

from __future__ import annotations

import json
from pathlib import Path

from accessory.tokenizer import hf_json, spm
from accessory.tokenizer.hf_json import JsonTokenizer
from accessory.tokenizer.sniff import is_tiktoken
from accessory.tokenizer.special import FLAGS, Added
from accessory.tokenizer.spm import SentencePieceTokenizer
from accessory.tokenizer.spm_pipeline import pipeline_of

_CLASS = "PreTrainedTokenizerFast"  # takes tokenizer.json as it is; other classes replace parts of it
# Keys that name files which are not written, or repeat what tokenizer.json says.
_UNFIT = ("auto_map", "tokenizer_file", "vocab_file", "merges_file", "name_or_path", "added_tokens_decoder")


def save_for_transformers(tokenizer: SentencePieceTokenizer | JsonTokenizer, directory: Path) -> None:
    """Write a whole tokenizer.json, its tokenizer_config.json, and the tokenizer.model where there is one.

    What opens a document stands in the post-processor, since transformers 5 ignores `add_bos_token` beside a
    tokenizer.json. `open_tokenizer` gives the same ids. Raises TokenizerError for a tokenizer without such a form.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        pipeline, model_file = pipeline_of(tokenizer), tokenizer.definition
    else:
        pipeline, model_file = tokenizer.stated_pipeline(), tokenizer.model_file
    pipeline |= {"truncation": None, "padding": None}
    if not isinstance(tokenizer, JsonTokenizer) or tokenizer.usual_start_ids() != tokenizer.start_ids:
        pipeline["post_processor"] = _start_processor(tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(pipeline, ensure_ascii=False, indent=1)
    (directory / hf_json.FILE_NAME).write_text(text, encoding="utf-8", newline="")
    if model_file is not None and not is_tiktoken(model_file):  # others expect sentencepiece's under this name
        spm.write_model_file(directory, model_file, hf_json.ids_of(pipeline))
    _write_config(tokenizer, pipeline["added_tokens"], directory)


def _start_processor(tokenizer: SentencePieceTokenizer | JsonTokenizer) -> dict:
    """A post-processor that puts the ids which open a document before each text, the second of a pair as well."""
    names = {token_id: token.content for token_id, token in tokenizer.control_tokens().items()}
    names[tokenizer.bos_id] = tokenizer.special_names().get("bos_token")
    start_tokens = {names[token_id]: token_id for token_id in tokenizer.start_ids}

    def text(sequence: str, type_id: int) -> list[dict]:
        """The start ids and then a text, as the tokenizers library states a template."""
        tokens = [{"SpecialToken": {"id": name, "type_id": type_id}} for name in start_tokens]
        return [*tokens, {"Sequence": {"id": sequence, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": text("A", 0) + text("B", 1),
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in start_tokens.items()},
    }


def _write_config(tokenizer: SentencePieceTokenizer | JsonTokenizer, added: list[dict], directory: Path) -> None:
    read = {key: value for key, value in tokenizer.special.config.items() if key not in _UNFIT}
    config = {"clean_up_tokenization_spaces": False, **read, "tokenizer_class": _CLASS}
    if isinstance(tokenizer, SentencePieceTokenizer):
        unknown = tokenizer.proto.pieces[tokenizer.proto.trainer_spec.unk_id].piece
        config = {"unk_token": unknown, **config, "legacy": tokenizer.legacy}
    stated = {token["id"]: Added(**{flag: token[flag] for flag in FLAGS}) for token in added}
    tokenizer.write_special(directory, config, stated)
