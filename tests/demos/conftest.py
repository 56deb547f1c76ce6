"""What tests of several demos use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

CHATML = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}<s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def with_template(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base's tokenizer with a chat template, by which `<s>` ends a turn."""
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "tokenizer.json").write_bytes((tiny_base / "tokenizer.json").read_bytes())
    config = json.loads((tiny_base / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHATML}))
    return directory
