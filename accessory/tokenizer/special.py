"""BOS and EOS as the small JSON files beside a vocabulary state them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from accessory.errors import TokenizerError
from accessory.tokenizer.sniff import what_is

NAMING_FILES = ("tokenizer_config.json", "special_tokens_map.json")
NUMBERING_FILES = ("generation_config.json", "config.json")


@dataclass(frozen=True)
class SpecialTokens:
    """What was stated; None where no file says anything.

    Attributes:
        bos, eos: the token's text.
        bos_id, eos_id: the token's id; the first one where a file lists several.
        no_bos: a file states that there is no BOS ("bos_token": null).
        add_bos: whether a document starts with BOS.
        config: the content of tokenizer_config.json, kept so that saving loses nothing of it.
    """

    bos: str | None = None
    eos: str | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    no_bos: bool = False
    add_bos: bool | None = None
    config: dict = field(default_factory=dict)


def read_special_tokens(directory: Path) -> SpecialTokens:
    """Gather what the files of `directory` state, the first file that speaks of a token being right.

    Raises TokenizerError for a file that is not a JSON object or that gives a value of another type.
    """
    naming = [(directory / name, _read_object(directory / name)) for name in NAMING_FILES]
    numbering = [(directory / name, _read_object(directory / name)) for name in NUMBERING_FILES]
    config_path, config = naming[0]
    add_bos = config.get("add_bos_token")
    if not isinstance(add_bos, bool | None):
        raise TokenizerError(f"{config_path}: 'add_bos_token' is {add_bos!r}; expected true or false.")
    return SpecialTokens(
        bos=_first(naming, "bos_token", _name),
        eos=_first(naming, "eos_token", _name),
        bos_id=_first(numbering, "bos_token_id", _number),
        eos_id=_first(numbering, "eos_token_id", _number),
        no_bos="bos_token" in config and config["bos_token"] is None,
        add_bos=add_bos,
        config=config,
    )


def write_special_tokens(directory: Path, config: dict, *, bos: str | None, eos: str, add_bos: bool) -> None:
    """Write tokenizer_config.json: `config` with the three settings resolved, so that no other file is needed."""
    stated = {**config, "bos_token": bos, "eos_token": eos, "add_bos_token": add_bos}
    text = json.dumps(stated, ensure_ascii=False, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _read_object(path: Path) -> dict:
    """The JSON object in `path`, {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: found {what_is(path)}; expected a JSON object ({error}).") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: found a JSON {type(content).__name__}; expected an object.")
    return content


def _first(files: list[tuple[Path, dict]], key: str, convert):
    """`convert` of the first stated value of `key`."""
    stated = ((path, content[key]) for path, content in files if content.get(key) is not None)
    return next((convert(path, key, value) for path, value in stated), None)


def _name(path: Path, key: str, value: object) -> str:
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise TokenizerError(f'{path}: {key!r} is {value!r}; expected a token\'s text or an object with "content".')
    return text


def _number(path: Path, key: str, value: object) -> int:
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, int) or isinstance(first, bool):
        raise TokenizerError(f"{path}: {key!r} is {value!r}; expected a token id or a list of them.")
    return first
