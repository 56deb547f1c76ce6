"""What is said of flags that cannot be."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from accessory.config import FinetuneConfig, parse
from accessory.errors import ConfigError


def refusal(arguments: list[str], kind: type[BaseModel] = FinetuneConfig) -> list[str]:
    """Lines of the message against `arguments`."""
    with pytest.raises(ConfigError) as caught:
        parse(kind, arguments)
    return str(caught.value).splitlines()
