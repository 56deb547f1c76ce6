"""`tokenizer.json`, the format of the `tokenizers` library."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import takewhile
from pathlib import Path

import tokenizers

from accessory.errors import TokenizerError
from accessory.tokenizer import spm
from accessory.tokenizer.base import Place, StatedTokenizer, looks_like_control
from accessory.tokenizer.sniff import may_be_model, what_is
from accessory.tokenizer.special import FLAGS, Added, SpecialTokens
from accessory.tokenizer.spm import write_model_file
from accessory.tokenizer.spm_pipeline import EXTRA_BLANKS
from accessory.tokenizer.trial import try_in_subprocess

FILE_NAME = "tokenizer.json"
_NEVER = -1e6  # score of a Unigram entry that any cutting into other known entries beats
_STEPS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}
"""What a sequence of steps is called, by the stage it is of."""
_EXPECTED = "expected a tokenizer.json of the `tokenizers` library"


class JsonTokenizer(StatedTokenizer):
    """A pipeline of the `tokenizers` library; its own file names no BOS and EOS, the files beside it (`special`) do."""

    def __init__(
        self, definition: str, special: SpecialTokens, *, source: str = FILE_NAME, model_file: bytes | None = None
    ) -> None:
        """`definition` is the text of a tokenizer.json; `source` is named in the TokenizerError of an unusable one.

        `model_file` holds the bytes of the tokenizer.model beside it, which other programs read; it is saved unchanged.
        """
        self._definition, self.special, self.source, self.model_file = definition, special, source, model_file
        pipeline = self.pipeline()
        self._main = _load(pipeline, source)
        self._check_added()
        continuing = _without_leading_space(pipeline)
        self._continuing = self._main if continuing == pipeline else _load(continuing, source)
        self.vocab_size = max(self._main.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._set_special(definition.encode() + self._added_definition())
        # An id that only config.json gives may be of a token which the pipeline takes for plain text.
        self._silent = {self.bos_id, self.eos_id}

    def pipeline(self) -> dict:
        """The tokenizer.json it works with, parsed: added tokens are in it, and control tokens are special."""
        pipeline, special = self.stated_pipeline(), self.special
        _mark_control_tokens(pipeline, {special.bos, special.eos, special.bos_id, special.eos_id}, special.new)
        return pipeline

    def stated_pipeline(self) -> dict:
        """The tokenizer.json as it was read, parsed, and the tokens that only files beside it list."""
        pipeline = _parse(self._definition, self.source)
        self._added = _add_missing(pipeline, self.special.added)
        return pipeline

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

    def control_tokens(self) -> dict[int, Added]:
        """See `Tokenizer.control_tokens`: the special ones among the added tokens."""
        return {token_id: token for token_id, token in self.added_tokens().items() if token.special}

    def token(self, token_id: int) -> str | None:
        """See `StatedTokenizer.token`."""
        return self._main.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        """See `StatedTokenizer.token_id`."""
        return self._main.token_to_id(token)

    def with_special(self, special: SpecialTokens) -> JsonTokenizer:
        """See `StatedTokenizer.with_special`."""
        return JsonTokenizer(self._definition, special, source=self.source, model_file=self.model_file)

    def encode_segment(self, text: str, place: Place) -> list[int]:
        """See `Tokenizer.encode_segment`. A space for the first word of a text is only added for the first segment.

        Other steps that add one do so for every segment.
        """
        if place == "behind_control":
            return self._behind_control.encode(text, add_special_tokens=False).ids
        return self.encode(text, continuation=place == "continued")

    @cached_property
    def _behind_control(self) -> tokenizers.Tokenizer:
        pipeline = self.pipeline()
        without = _strip_prefix_steps(pipeline.get("pre_tokenizer"), "pre_tokenizer", only_first=True)
        if without == pipeline.get("pre_tokenizer"):
            return self._main
        return _load({**pipeline, "pre_tokenizer": without}, self.source)

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer.model as they were read, tokenizer_config.json, and the stop ids.

        With a tokenizer.model, tokenizer_config.json lists all added tokens and added_tokens.json those that the model
        lacks, for programs that read no tokenizer.json.
        """
        directory.mkdir(parents=True, exist_ok=True)
        (directory / FILE_NAME).write_text(self._definition, encoding="utf-8", newline="")
        if self.model_file is not None:
            write_model_file(directory, self.model_file, ids_of(self.stated_pipeline()))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special.config}
        self.write_special(directory, config, self._added if self.model_file is None else self.added_tokens())

    def added_tokens(self) -> dict[int, Added]:
        """See `Tokenizer.added_tokens`: all that tokenizer.json and the files beside it list."""
        stated = self._main.get_added_tokens_decoder()
        return {token_id: Added(**{name: getattr(token, name) for name in FLAGS}) for token_id, token in stated.items()}

    def _check_added(self) -> None:
        """The library gives the next free id to a token it adds, whatever id was asked for."""
        for token_id, token in self._added.items():
            found = self._main.token_to_id(token.content)
            if found != token_id:
                raise TokenizerError(
                    f"{self.source}: a file beside it gives the added token {token.content!r} the id {token_id}, "
                    f"where this vocabulary has {found}; expected ids that go on where it ends."
                )

    def usual_start_ids(self) -> tuple[int, ...]:
        """See `StatedTokenizer.usual_start_ids`: those that the pipeline's post-processor puts before a text."""
        found = self._main.encode("a", add_special_tokens=True)
        made_up = list(takewhile(lambda pair: pair[1], zip(found.ids, found.special_tokens_mask, strict=True)))
        ids = [token_id for token_id, _ in made_up]
        if len(ids) == len(found.ids) and ids[-1:] == [self.eos_id]:  # a vocabulary without "a": EOS follows at once
            ids.pop()
        return tuple(ids)


def open_json(path: Path, special: SpecialTokens) -> JsonTokenizer:
    """Read a tokenizer.json. Raises TokenizerError saying what the file is where it is not one."""
    beside = path.with_name(spm.FILE_NAME)
    try:
        definition = path.read_bytes().decode("utf-8-sig")
        model_file = beside.read_bytes() if path.name == FILE_NAME and may_be_model(beside) else None
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: found {what_is(path)}; {_EXPECTED}.") from error
    return JsonTokenizer(definition, special, source=str(path), model_file=model_file)


def _parse(definition: str, source: str) -> dict:
    found = what_is(Path(source)) if Path(source).is_file() else f"{len(definition)} characters"
    try:
        pipeline = json.loads(definition)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{source}: found {found}; {_EXPECTED}, whole and undamaged ({error}).") from error
    if not isinstance(pipeline, dict) or not isinstance(pipeline.get("model"), dict):
        raise TokenizerError(f'{source}: found {found} with no "model" in it; {_EXPECTED}.')
    # Some published files ask for truncation and padding, which are not the tokenizer's task here.
    pipeline["truncation"] = pipeline["padding"] = None
    try_in_subprocess("tokenizers", json.dumps(pipeline).encode(), f"{source}: {_EXPECTED}")
    return pipeline


def ids_of(pipeline: dict) -> dict[str, int]:
    """The ids of all tokens of a tokenizer.json (parsed), as text spells them."""
    entries = pipeline["model"]["vocab"]
    ids = entries.items() if isinstance(entries, dict) else ((entry[0], place) for place, entry in enumerate(entries))
    added = {token["content"]: token["id"] for token in pipeline["added_tokens"]}
    known = set(added.values())
    return added | {token.replace(spm.BLANK, " "): token_id for token, token_id in ids if token_id not in known}


def _add_missing(pipeline: dict, added: dict[int, Added]) -> dict[int, Added]:
    """Add to the pipeline the tokens which only a file beside it lists, and return those."""
    listed = pipeline.get("added_tokens") or []
    known = {token["content"] for token in listed}
    missing = {token_id: token for token_id, token in sorted(added.items()) if token.content not in known}
    pipeline["added_tokens"] = listed + [{"id": token_id, **asdict(token)} for token_id, token in missing.items()]
    return missing


def _mark_control_tokens(pipeline: dict, special: set[str | int | None], new: tuple[str, ...]) -> None:
    """Make special, hence unmatched in text, every added token that is BOS, EOS or spelled like a control marker.

    Those that a user added (`new`) may be spelled like one.
    """
    for token in pipeline.get("added_tokens") or ():
        marker = looks_like_control(token["content"]) and token["content"] not in new
        if marker or {token["content"], token["id"]} & special:
            token["special"] = True
    if pipeline["model"].get("type") == "Unigram":  # which looks for all entries alike: a text is to be cut otherwise
        silent = {token["content"] for token in pipeline.get("added_tokens") or () if token["special"]}
        for entry in pipeline["model"].get("vocab") or ():
            if entry[0] in silent:
                entry[1] = _NEVER


def _without_leading_space(pipeline: dict) -> dict:
    """The same pipeline for text that continues another: no step adds a leading space or removes one."""
    continuing = copy.deepcopy({key: value for key, value in pipeline.items() if key != "model"})
    for stage in _STEPS:
        continuing[stage] = _strip_prefix_steps(continuing.get(stage), stage)
    return {**continuing, "model": pipeline["model"]}


def _strip_prefix_steps(step: dict | None, stage: str, *, only_first: bool = False) -> dict | None:
    """A step without what makes up a leading space; `only_first`: only where it is for the first word of a text."""
    kind = step.get("type") if isinstance(step, dict) else None  # the library takes lists of a step's values, too
    if kind == "Sequence":
        key = _STEPS[stage]
        kept = [_strip_prefix_steps(inner, stage, only_first=only_first) for inner in step[key]]
        return {**step, key: [inner for inner in kept if inner is not None]}
    if kind == "Metaspace" and (not only_first or step.get("prepend_scheme") == "first"):
        # Older files say add_prefix_space, which the library refuses when it disagrees with prepend_scheme.
        without = {key: value for key, value in step.items() if key != "add_prefix_space"}
        return {**without, "prepend_scheme": "never"}
    if only_first:
        return step
    if kind == "Prepend" or (kind == "Replace" and step["pattern"].get("Regex") in EXTRA_BLANKS):
        return None
    if kind == "ByteLevel":
        return {**step, "add_prefix_space": False}
    return step


def _load(pipeline: dict, source: str) -> tokenizers.Tokenizer:
    try:
        loaded = tokenizers.Tokenizer.from_str(json.dumps(pipeline, ensure_ascii=False))
    except BaseException as error:  # the library raises bare Exception, or panics, which no Exception catches
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise TokenizerError(f"{source}: {_EXPECTED}, but the library refuses it ({error}).") from error
    loaded.encode_special_tokens = True
    return loaded
