"""Files that flags name and that are not there: the error says where to find them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.refusal import refusal
from tests.conftest import ROOT


def test_names_on_the_hub(paths: list[str]) -> None:
    """They are not fetched; the error gives the command that fetches them."""
    lines = refusal([*paths[2:], "--pretrained_path", "meta-llama/Llama-2-7b-hf", "--tokenizer_path", f"{paths[1]}/x"])
    assert lines == [
        "--pretrained_path meta-llama/Llama-2-7b-hf: no such file or directory. If this is a name on the Hugging Face "
        "Hub: download it first (hf download meta-llama/Llama-2-7b-hf --local-dir Llama-2-7b-hf), then give the "
        "directory.",
        f"--tokenizer_path {paths[1]}/x: no such file or directory.",
    ]


def test_paths_from_the_root_of_the_repository(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere, such as in accessory/, where upstream's users start: the error says where they lie."""
    monkeypatch.chdir(tmp_path)
    settings, data = (f"configs/{name}" for name in ("model/finetune/sg/llamaQst.json", "data/finetune/sg/alpaca.yaml"))
    lines = refusal([*paths[:2], "--llama_config", settings, "--data_config", data])
    root = ROOT
    assert lines[0] == (
        f"--llama_config {settings}: no such file or directory. There is {root / settings}: give that, or start in "
        f"{root}."
    )
    assert lines[1].endswith(f"--data_dir data. There is {root / data}: give that, or start in {root}.")


@pytest.mark.parametrize(("path", "fetched", "given"), [
    ("hf://a/b", "a/b", "the directory"), ("hf://a/b/c/d", "a/b --include 'c/d/*'", "b/c/d"),
    ("https://huggingface.co/a/b", "a/b", "the directory"),
])  # fmt: skip
def test_addresses_on_the_hub(paths: list[str], path: str, fetched: str, given: str) -> None:
    """`hf://` is what LLaMA2-Accessory fetches itself."""
    (line,) = refusal([*paths[2:], "--pretrained_path", path])
    assert line.endswith(f"(hf download {fetched} --local-dir b), then give {given}.")


def test_a_directory_for_a_file(paths: list[str]) -> None:
    assert refusal([*paths, "--llama_config", paths[1]]) == [
        f"--llama_config {paths[1]}: is a directory; expected a JSON file."
    ]
