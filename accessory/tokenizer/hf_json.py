"""`tokenizer.json`, the format of the `tokenizers` library."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from accessory.errors import TokenizerError
from accessory.tokenizer.base import Tokenizer, looks_like_control
from accessory.tokenizer.sniff import what_is
from accessory.tokenizer.special import SpecialTokens, write_special_tokens

FILE_NAME = "tokenizer.json"
_NEVER = -1e6  # score of a Unigram entry that any cutting into other known entries beats
_EXPECTED = "expected a tokenizer.json of the `tokenizers` library"


class JsonTokenizer(Tokenizer):
    """A pipeline of the `tokenizers` library; its own file names no BOS and EOS, the files beside it do."""

    def __init__(self, definition: str, special: SpecialTokens, *, source: str = FILE_NAME) -> None:
        """`definition` is the text of a tokenizer.json; `source` is named in the TokenizerError of an unusable one."""
        pipeline = _parse(definition, source)
        # Cutting and padding are the corpus' business; some published files carry both.
        pipeline["truncation"] = pipeline["padding"] = None
        _mark_control_tokens(pipeline, {special.bos, special.eos, special.bos_id, special.eos_id})
        self._definition = definition
        self._config = special.config
        self._main = _load(pipeline, source)
        continuing = _without_leading_space(pipeline)
        self._continuing = self._main if continuing == pipeline else _load(continuing, source)
        self.vocab_size = max(self._main.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        eos_id = self._resolve("eos_token", special.eos, special.eos_id, source)
        if eos_id is None:
            raise TokenizerError(
                f"{source}: no file beside it names the end of a document; expected 'eos_token' in "
                "tokenizer_config.json or 'eos_token_id' in config.json."
            )
        bos_id = None if special.no_bos else self._resolve("bos_token", special.bos, special.bos_id, source)
        add_bos = self._adds_bos(bos_id) if special.add_bos is None else special.add_bos
        self._set_special(bos_id=bos_id, eos_id=eos_id, add_bos=add_bos, definition=definition.encode(), source=source)
        # An id that only config.json knows may name a token which the pipeline holds for plain text.
        self._silent = {self.bos_id, self.eos_id}

    def encode_batch(self, texts: Sequence[str], *, continuation: bool = False, threads: int = 1) -> list[list[int]]:
        """See `Tokenizer.encode_batch`. The library has a thread pool of its own, which `threads` > 1 switches on."""
        pipeline = self._continuing if continuation else self._main
        if threads > 1 and len(texts) > 1:
            return [found.ids for found in pipeline.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [pipeline.encode(text, add_special_tokens=False).ids for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer.decode`."""
        known = [int(i) for i in ids if 0 <= i < self.vocab_size and i not in self._silent]
        return self._main.decode(known, skip_special_tokens=True)

    def save(self, directory: Path) -> None:
        """Write tokenizer.json as it was read, and tokenizer_config.json."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / FILE_NAME).write_text(self._definition, encoding="utf-8", newline="")
        bos = None if self.bos_id is None else self._main.id_to_token(self.bos_id)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._config}
        eos = self._main.id_to_token(self.eos_id)
        write_special_tokens(directory, config, bos=bos, eos=eos, add_bos=self.add_bos)

    def _resolve(self, key: str, name: str | None, token_id: int | None, source: str) -> int | None:
        found = self._main.token_to_id(name) if name is not None else token_id
        if name is not None and found is None:
            raise TokenizerError(f"{source}: tokenizer_config.json names {key} {name!r}, which is no token of it.")
        if found is not None and found < self.vocab_size and self._main.id_to_token(found) is None:
            raise TokenizerError(f"{source}: config.json gives {key} the id {found}, which is no token of it.")
        return found

    def _adds_bos(self, bos_id: int | None) -> bool:
        """Whether the pipeline's post-processor puts BOS before a text."""
        return bos_id is not None and self._main.encode("", add_special_tokens=True).ids[:1] == [bos_id]


def open_json(path: Path, special: SpecialTokens) -> JsonTokenizer:
    """Read a tokenizer.json. Raises TokenizerError saying what the file is where it is not one."""
    try:
        definition = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: found {what_is(path)}; {_EXPECTED}.") from error
    return JsonTokenizer(definition, special, source=str(path))


def _parse(definition: str, source: str) -> dict:
    found = what_is(Path(source)) if Path(source).is_file() else f"{len(definition)} characters"
    try:
        pipeline = json.loads(definition)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{source}: found {found}; {_EXPECTED}, whole and undamaged ({error}).") from error
    if not isinstance(pipeline, dict) or not isinstance(pipeline.get("model"), dict):
        raise TokenizerError(f'{source}: found {found} with no "model" in it; {_EXPECTED}.')
    return pipeline


def _mark_control_tokens(pipeline: dict, special: set[str | int | None]) -> None:
    """Make special, hence unmatched in text, every added token that is BOS, EOS or spelled like a control marker."""
    for token in pipeline.get("added_tokens") or ():
        if {token["content"], token["id"]} & special or looks_like_control(token["content"]):
            token["special"] = True
    if pipeline["model"].get("type") == "Unigram":
        _never_match_special(pipeline)


def _never_match_special(pipeline: dict) -> None:
    """Score special entries so low that a text is cut otherwise: a Unigram model looks for all entries alike."""
    special = {token["content"] for token in pipeline.get("added_tokens") or () if token["special"]}
    for entry in pipeline["model"].get("vocab") or ():
        if entry[0] in special:
            entry[1] = _NEVER


def _without_leading_space(pipeline: dict) -> dict:
    """The same pipeline for text that continues another: no step of it makes up a leading space."""
    continuing = copy.deepcopy({key: value for key, value in pipeline.items() if key != "model"})
    for stage in ("normalizer", "pre_tokenizer"):
        continuing[stage] = _strip_prefix_steps(continuing.get(stage))
    return {**continuing, "model": pipeline["model"]}


def _strip_prefix_steps(step: dict | None) -> dict | None:
    kind = (step or {}).get("type")
    if kind == "Sequence":
        key = "normalizers" if "normalizers" in step else "pretokenizers"
        kept = [inner for inner in map(_strip_prefix_steps, step[key]) if inner is not None]
        return {**step, key: kept}
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        # Older files say add_prefix_space, which the library refuses when it disagrees with prepend_scheme.
        without = {key: value for key, value in step.items() if key != "add_prefix_space"}
        return {**without, "prepend_scheme": "never"}
    if kind == "ByteLevel":
        return {**step, "add_prefix_space": False}
    return step


def _load(pipeline: dict, source: str) -> tokenizers.Tokenizer:
    try:
        loaded = tokenizers.Tokenizer.from_str(json.dumps(pipeline, ensure_ascii=False))
    except Exception as error:  # the library raises bare Exception for every fault of a file
        raise TokenizerError(f"{source}: {_EXPECTED}, but the library refuses it ({error}).") from error
    loaded.encode_special_tokens = True
    return loaded
