"""Flags -> a config: the command line of an entry is made of its config's fields."""

from __future__ import annotations

import argparse
import json
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from accessory.errors import ConfigError, explain_validation
from accessory.foreign_names import unknown

Config = TypeVar("Config", bound=BaseModel)


def parse(config_class: type[Config], arguments: list[str]) -> Config:
    """Flags -> a config. Raises `ConfigError` listing every fault, each with the nearest valid name."""
    parser = _parser(config_class)
    known, strange = parser.parse_known_args(arguments)
    faults = _unknown_words(strange, arguments, config_class)
    values = {name: value for name, value in vars(known).items() if value is not argparse.SUPPRESS}
    required = [name for name, field in config_class.model_fields.items() if field.is_required()]
    for name, value in values.items():
        if value == "" and name not in required:
            values[name] = None
        elif value == "" or (isinstance(value, list) and "" in value):
            faults.append(f"--{name} '': expected a value; is a variable of the shell empty?")
    config = None
    try:
        config = config_class(**values)
    except ValidationError as error:
        found = explain_validation(error, "flags", config_class.model_fields)
        faults += [line.replace("flags: '", "--", 1).replace("'", "", 1) for line in found.splitlines()]
    if config is not None:
        faults += config.faults()
    if faults:
        raise ConfigError("\n".join(faults), common=True)
    return config


def _unknown_words(words: list[str], arguments: list[str], config_class: type[BaseModel]) -> list[str]:
    """One fault for each unknown flag, and for each word that follows none."""
    flags = [f"--{name}" for name in config_class.model_fields]
    switches = [f"--{name}" for name, field in config_class.model_fields.items() if _is_switch(field)]
    faults, after_flag = [], False
    for word in words:
        if word.startswith("-"):
            name = word.split("=")[0]
            faults.append(f"Unknown flag {name}{unknown(name, flags, flags)}")
            after_flag = True
        elif not after_flag:
            before = arguments[arguments.index(word) - 1]
            why = ": flags are written --name value" if "=" in word else ""
            why = f": {before} is a switch and takes no value" if before in switches else why
            faults.append(f"{word!r} belongs to no flag{why}.")
    return faults


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """Raise our error instead of leaving the process from every rank."""
        message = message.replace("ignored explicit argument", "is a switch and takes no value; found")
        raise ConfigError(message[0].upper() + message[1:] + ".", common=True)


def _parser(config_class: type[BaseModel]) -> argparse.ArgumentParser:
    parser = _Parser(description=config_class.__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, field in required_first(config_class).items():
        options: dict[str, Any] = {"help": (field.description or "").replace("%", "%%") + _default_text(field)}
        if _is_switch(field):
            if field.default is not False:
                parser.add_argument(f"--no_{name}", dest=name, action="store_false", help=f"Not --{name}.")
            options["action"] = "store_true"
        elif get_origin(field.annotation) is list:
            options["nargs"] = "+" if field.is_required() else "*"
        elif bare := (field.json_schema_extra or {}).get("bare"):
            options |= {"nargs": "?", "const": bare}
        parser.add_argument(f"--{name}", **options)
    return parser


def required_first(config_class: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields by name, as they are shown: those that must be given stand first."""
    return dict(sorted(config_class.model_fields.items(), key=lambda named: not named[1].is_required()))


def _is_switch(field: FieldInfo) -> bool:
    return bool in (field.annotation, *get_args(field.annotation))


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return " Required."
    default = ",".join(field.default) if isinstance(field.default, list) else field.default
    return "" if field.default_factory or default in (None, False, "") else f" Default: {default}."


def plain(config: BaseModel) -> dict[str, Any]:
    """A config as JSON-ready values."""
    return json.loads(config.model_dump_json())
