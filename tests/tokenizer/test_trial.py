"""What brings a library down is an error here; what it can use passes, once."""

from __future__ import annotations

import json
import time

import pytest
import tokenizers

from accessory.errors import TokenizerError
from accessory.tokenizer import trial
from accessory.tokenizer.trial import run_in_subprocess, try_in_subprocess

PANICS = json.dumps({
    "version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": ""},
}).encode()  # fmt: skip


@pytest.mark.parametrize(("program", "fault"), [
    ("import sys; sys.exit(sys.stdin.buffer.read() != b'given')", None),
    ("import ctypes; ctypes.string_at(0)", "was brought down by it (SIGSEGV)"),
    ("import os; os.abort()", "was brought down by it (SIGABRT)"),
    ("import sys; sys.exit('no such thing')", "cannot use it (no such thing)"),
    ("import os; os._exit(3)", "cannot use it (status 3)"),
])  # fmt: skip
def test_how_a_process_ends_is_told(program: str, fault: str | None) -> None:
    assert run_in_subprocess(program, b"given") == fault


def test_one_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_PATIENCE", 1)
    began = time.monotonic()
    assert run_in_subprocess("import time; time.sleep(100)", b"") == "is not done with it after 1 s"
    assert time.monotonic() - began < 90


def test_a_panic_that_no_handler_of_exceptions_sees_is_an_error() -> None:
    with pytest.raises(BaseException, match="Precompiled") as panic:
        tokenizers.Tokenizer.from_buffer(PANICS)
    assert not isinstance(panic.value, Exception)
    with pytest.raises(TokenizerError, match=r"^a\.json, but tokenizers cannot use it \(Precompiled: .*\)\.$"):
        try_in_subprocess("tokenizers", PANICS, "a.json")


def test_what_passed_is_not_tried_again(spm_model: bytes, byte_level: tokenizers.Tokenizer, monkeypatch) -> None:
    vocabularies = {"sentencepiece": spm_model, "tokenizers": byte_level.to_str().encode()}
    for library, definition in vocabularies.items():
        try_in_subprocess(library, definition, "")
    monkeypatch.setattr(trial, "run_in_subprocess", lambda *_: "is asked again")
    for library, definition in vocabularies.items():
        try_in_subprocess(library, definition, "")
        with pytest.raises(TokenizerError, match=f"it, but {library} is asked again"):
            try_in_subprocess(library, definition + b" ", "it")
