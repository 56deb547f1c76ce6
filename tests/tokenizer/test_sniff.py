import pytest

from accessory.tokenizer.sniff import what_is


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git-LFS pointer"),
        (b"\xef\xbb\xbf\n <!DOCTYPE html><html>", "an HTML page"),
        (b"<html><body>404", "an HTML page"),
        (b"GGUF\x03\x00\x00\x00", "a GGUF file of 8 bytes"),
        (b"PK\x03\x04rest", "a zip archive"),
        (b"\x1f\x8b\x08", "a gzip archive"),
        (b'{"a": 1}', "a JSON-like text"),
        (b"plain words", "a text file of 11 bytes"),
        (b"\x00\x01\xfe\xff", "a binary file"),
        ("é".encode() * 300, "a text file"),
        (b"x" + "é".encode() * 300, "a text file"),
    ],
)
def test_kind_by_first_bytes(tmp_path, content, words):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert what_is(path).startswith(words)


def test_what_is_no_file(tmp_path):
    assert what_is(tmp_path) == "a directory"
    assert what_is(tmp_path / "absent") == "no such file"
