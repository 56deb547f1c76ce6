"""Which flags all processes must be given alike."""

from __future__ import annotations

from accessory.config import PretrainConfig
from accessory.run.identity import shared_flags


def test_files_that_the_main_rank_looks_at_for_all_are_compared() -> None:
    """Where others would read other files, nothing else would tell."""
    flags = shared_flags(PretrainConfig(data_meta_path="a.json", data_root="here", tokenizer_path="there"))
    assert flags["data_meta_path"] == "a.json" and flags["data_root"] == "here"
    assert "tokenizer_path" not in flags  # whose vocabulary is compared instead
