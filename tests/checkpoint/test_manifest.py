"""Damage to a saved checkpoint is told, file by file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from accessory.checkpoint.manifest import MANIFEST_FILE, verify
from accessory.errors import CheckpointError
from tests.checkpoint.made_checkpoints import FILES, checkpoint, cut, flip


def test_manifest_has_size_and_sha256_of_every_file(tmp_path: Path) -> None:
    """As Python's own hashlib gives them."""
    manifest = json.loads((checkpoint(tmp_path / "c") / MANIFEST_FILE).read_text())
    assert manifest["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in FILES.items()
    }
    assert verify(tmp_path / "c") == 7


@pytest.mark.parametrize(("harm", "said"), [
    (flip, "has other contents than were saved"),
    (cut, "bytes, was saved with"),
    (Path.unlink, "is missing"),
    (lambda path: path.write_bytes(b""), "has 0 bytes"),
], ids=["bit", "cut", "gone", "empty"])  # fmt: skip
@pytest.mark.parametrize("name", FILES)
def test_damage_names_the_file(tmp_path: Path, name: str, harm, said: str) -> None:
    path = checkpoint(tmp_path / "c")
    harm(path / name)
    with pytest.raises(CheckpointError, match=f"c: is damaged: {name} .*{said}"):
        verify(path)


def test_all_faults_at_once(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "c")
    (path / "run.json").unlink()
    flip(path / "trainable.safetensors")
    with pytest.raises(CheckpointError, match=r"run.json is missing; trainable.safetensors has other contents"):
        verify(path)


@pytest.mark.parametrize(("content", "said"), [
    ("", "expected a JSON object"),
    ("[]", "holds a list"),
    ('{"format": 1}', "is no manifest of format 1"),
    ('{"format": 2, "step": 1, "files": {}}', "is no manifest of format 1"),
    ('{"format": 1, "step": true, "files": {}}', "is no manifest of format 1"),
    ('{"format": 1, "step": 1, "files": {"a": 3}}', "says 3 of 'a'"),
    ('{"format": 1, "step": 1, "files": {"a": {"bytes": [1], "sha256": "0"}}}', r"says {'bytes': \[1\].* of 'a'"),
    ('{"format": 1, "step": 1, "files": {"../a": {"bytes": 1, "sha256": ""}}}', "lists '../a'; expected names"),
    ('{"format": 1, "step": 1, "files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}', "lists '/etc/passwd'"),
    ('{"format": 1, "step": 1, "files": {"..": {"bytes": 1, "sha256": ""}}}', "lists '..'"),
])  # fmt: skip
def test_manifests_that_are_none(tmp_path: Path, content: str, said: str) -> None:
    path = checkpoint(tmp_path / "c")
    (path / MANIFEST_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=said):
        verify(path)
