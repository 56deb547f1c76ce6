"""A tiny model in fp32, and our harness beside the original; libraries are loaded where they are needed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers

from accessory.meta import MetaModel
from accessory.parallel import groups
from tests.eval.published import write_published


@pytest.fixture(scope="session")
def model(tiny_base: Path) -> Iterator[MetaModel]:
    """`tiny_base`, alone on the CPU, with room for 128 tokens."""
    groups.start("cpu")
    yield MetaModel.from_pretrained(tiny_base, dtype="fp32", max_seq_len=128, device="cpu")
    groups.stop()


@pytest.fixture(scope="session")
def with_bos(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_base` with a tokenizer that adds BOS in transformers, too."""
    copy = shutil.copytree(tiny_base, tmp_path_factory.mktemp("with_bos"), dirs_exist_ok=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(copy / "tokenizer.json"))
    return copy


@pytest.fixture(scope="session")
def both(with_bos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """(Harness, TheirHarness), over published files; two examples are shown."""
    from accessory.eval.harness import Harness, TaskSettings
    from tests.eval.beside_hf import TheirHarness

    data = write_published(tmp_path_factory.mktemp("data"))
    settings = TaskSettings(task_data=data)
    ours = MetaModel.from_pretrained(with_bos, dtype="fp32", max_seq_len=256, device="cpu")
    return Harness(ours, settings), TheirHarness(with_bos, settings, batch_size=4)
