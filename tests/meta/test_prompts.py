"""What is a prompt, and what is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accessory.data.templates import DIALOG
from accessory.errors import ConfigError
from accessory.meta import MetaModel
from tests.meta.byte_models import CHATML, VOCABULARY


@pytest.mark.parametrize(
    "prompts", [[3], [["a", "b"]], [[]], None, iter(["a"]), {"a": 1}], ids=lambda given: type(given).__name__
)
def test_what_is_no_prompt(model: MetaModel, prompts: object) -> None:
    """Of what is read once, nothing would be left to answer."""
    with pytest.raises(ConfigError, match=r"expected a prompt, or a list of them|expected a text, a list of messages"):
        model.generate(prompts)


def test_one_prompt_has_one_answer(checkpoint, tmp_path: Path) -> None:
    """In each form of a prompt, and with the options of a list of them."""
    checkpoint(vocab_size=VOCABULARY)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHATML}))
    model = MetaModel.from_pretrained(tmp_path, dtype="fp32")
    how = {"max_gen_len": 5, "temperature": 1.0, "seed": 3}
    messages = [{"role": "user", "content": "q"}]
    for prompt in ("Hello", messages, model.question("q", prompt_layout=DIALOG)):
        assert model.generate(prompt, **how) == model.generate([prompt], **how)[0] != ""
