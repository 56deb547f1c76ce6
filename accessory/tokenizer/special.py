"""What the small files beside a vocabulary state: BOS, EOS, added tokens, the chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from accessory.errors import AccessoryError, TokenizerError
from accessory.tokenizer.sniff import what_is

NAMING_FILES = ("tokenizer_config.json", "special_tokens_map.json")
NUMBERING_FILES = ("generation_config.json", "config.json")
TEMPLATE_FILE, ADDED_FILE = "chat_template.jinja", "added_tokens.json"
NEW_TOKENS = "accessory_new_tokens"
"""Key of tokenizer_config.json for `SpecialTokens.new`."""
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Added:
    """A token beside the vocabulary proper. Special ones are never matched in text and decode to none.

    `lstrip` and `rstrip` let a match swallow the blanks before or after it; `normalized` ones are looked for in the
    normalized text, `single_word` ones only between the ends of words.
    """

    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False


FLAGS = [flag.name for flag in fields(Added)]


@dataclass(frozen=True)
class SpecialTokens:
    """What was stated; None where no file says anything.

    Attributes:
        bos, eos: the token's text.
        bos_id, eos_id: the token's id; the first one where a file lists several.
        no_bos: a file states that there is no BOS ("bos_token": null).
        add_bos: whether a document starts with BOS.
        stop_ids: all ids that end an answer, as generation_config.json or config.json lists them.
        added: tokens with the ids they have, or shall have, in the vocabulary.
        named: names of all special tokens (BOS, EOS, unknown, padding, additional ones), given without an id.
        config: the content of tokenizer_config.json, with the chat template and the names that other files give, kept
            so that saving loses nothing.
    """

    bos: str | None = None
    eos: str | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    no_bos: bool = False
    add_bos: bool | None = None
    stop_ids: tuple[int, ...] = ()
    added: dict[int, Added] = field(default_factory=dict)
    named: tuple[str, ...] = ()
    config: dict = field(default_factory=dict)

    @property
    def new(self) -> tuple[str, ...]:
        """Tokens that a user added. Text matches them even where they are spelled like control markers."""
        stated = self.config.get(NEW_TOKENS)
        return tuple(name for name in stated if isinstance(name, str)) if isinstance(stated, list) else ()


def read_special_tokens(directory: Path, *, whole_json: bool = False) -> SpecialTokens:
    """Gather what the files of `directory` state; where several state a token, the first file counts.

    `whole_json`: a tokenizer.json is read, beside which transformers asks added_tokens.json only where
    tokenizer_config.json lists no added tokens. Raises TokenizerError for a file that is not a JSON object or that
    gives a value of another type.
    """
    naming = [(directory / name, _stated_in(directory / name)) for name in NAMING_FILES]
    numbering = [(directory / name, _stated_in(directory / name)) for name in NUMBERING_FILES]
    config_path, config = naming[0]
    add_bos = config.get("add_bos_token")
    if not isinstance(add_bos, bool | None):
        raise TokenizerError(f"{config_path}: 'add_bos_token' is {add_bos!r}; expected true or false.")
    stop_ids = _first(numbering, "eos_token_id", _numbers) or ()
    named = _named(naming)
    return SpecialTokens(
        bos=_first(naming, "bos_token", _name),
        eos=_first(naming, "eos_token", _name),
        bos_id=(_first(numbering, "bos_token_id", _numbers) or (None,))[0],
        eos_id=(stop_ids or (None,))[0],
        no_bos="bos_token" in config and config["bos_token"] is None,
        add_bos=add_bos,
        stop_ids=stop_ids,
        added=_added(directory, config, named, read_plain=not (whole_json and "added_tokens_decoder" in config)),
        named=named,
        config=_completed(directory, config, naming[1][1]),
    )


def write_special_tokens(
    directory: Path,
    config: dict,
    *,
    bos: str | None,
    eos: str,
    add_bos: bool,
    stop_ids: tuple[int, ...],
    added: dict[int, Added] | None = None,
) -> None:
    """Write tokenizer_config.json: `config` with the settings resolved, so that no other file is needed.

    Where several ids end an answer, generation_config.json lists `stop_ids`, as it does for transformers. `added` are
    the tokens that the vocabulary's own file does not hold.
    """
    stated = {**config, "bos_token": bos, "eos_token": eos, "add_bos_token": add_bos}
    if added:
        listed = {str(token_id): asdict(token) for token_id, token in sorted(added.items())}
        stated["added_tokens_decoder"] = {**listed, **(config.get("added_tokens_decoder") or {})}
    write_object(directory / NAMING_FILES[0], stated)
    if len(stop_ids) > 1:
        path = directory / NUMBERING_FILES[0]
        write_object(path, {**_stated_in(path), "eos_token_id": list(stop_ids)})


def further_names(config: dict) -> dict[str, str]:
    """The special tokens a tokenizer_config.json names, by key; values of another shape are left out."""
    stated = {key: config.get(key) for key in _NAMED}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in stated.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def read_object(path: Path, fault: type[AccessoryError] = TokenizerError) -> dict[str, Any]:
    """The JSON object in a file. Raises `fault` naming file and line for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise fault(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise fault(f"{path}: found {what_is(path)}; expected a JSON object ({error}).") from error
    if not isinstance(content, dict):
        raise fault(f"{path}: holds a {type(content).__name__}; expected a JSON object.")
    return content


def _stated_in(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def write_object(path: Path, content: dict) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _added(directory: Path, config: dict, named: tuple[str, ...], read_plain: bool) -> dict[int, Added]:
    """Tokens of added_tokens.json, if `read_plain`, replaced by those of tokenizer_config.json, which says more.

    The first file does not say which tokens are special: as in transformers, the named ones are.
    """
    plain, path = _stated_in(directory / ADDED_FILE) if read_plain else {}, directory / NAMING_FILES[0]
    found = {}
    for content, token_id in plain.items():
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not content:
            raise TokenizerError(f"{directory / ADDED_FILE}: {content!r} is {token_id!r}; expected an id.")
        found[token_id] = Added(content, special=content in named, normalized=content not in named)
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{path}: 'added_tokens_decoder' is a {type(decoder).__name__}; expected an object.")
    return found | {_id(path, key): _token(path, key, value) for key, value in decoder.items()}


def _id(path: Path, key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 10):
        raise TokenizerError(f"{path}: 'added_tokens_decoder' has the key {key!r}; expected ids.")
    return int(key)


def _token(path: Path, key: str, value: object) -> Added:
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, str) or not content:
        raise TokenizerError(f"{path}: token {key} of 'added_tokens_decoder' is {value!r}; expected 'content' in it.")
    return Added(content, **{flag: bool(value.get(flag)) for flag in FLAGS[1:]})


def _named(naming: list[tuple[Path, dict]]) -> tuple[str, ...]:
    """Names of all special tokens that have one, each once."""
    found = [name for key in _NAMED if (name := _first(naming, key, _name)) is not None]
    found += _first(naming, "additional_special_tokens", _names) or ()
    return tuple(dict.fromkeys(found))


def _completed(directory: Path, config: dict, names: dict) -> dict:
    """The configuration with the `names` of special_tokens_map.json that it lacks, and chat_template.jinja's template.

    That file takes precedence where there is one.
    """
    config = {**config, **{key: value for key, value in names.items() if config.get(key) is None}}
    path = directory / TEMPLATE_FILE
    if path.is_file():
        try:
            config["chat_template"] = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path}: found {what_is(path)}; expected a Jinja template ({error}).") from error
    return config


def _first(files: list[tuple[Path, dict]], key: str, convert: Callable[[Path, str, object], _Found]) -> _Found | None:
    """`convert` of the first stated value of `key`."""
    stated = ((path, content[key]) for path, content in files if content.get(key) is not None)
    return next((convert(path, key, value) for path, value in stated), None)


def _name(path: Path, key: str, value: object) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise TokenizerError(f'{path}: {key!r} is {value!r}; expected a token\'s text or an object with "content".')
    return text


def _names(path: Path, key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TokenizerError(f"{path}: {key!r} is {value!r}; expected a list of tokens.")
    return tuple(_name(path, key, item) for item in value)


def _numbers(path: Path, key: str, value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) and value else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
        raise TokenizerError(f"{path}: {key!r} is {value!r}; expected a token id or a list of them.")
    return tuple(dict.fromkeys(values))
