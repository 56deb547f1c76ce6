import struct

import gguf
import pytest

from accessory.errors import TokenizerError
from accessory.tokenizer.gguf_metadata import read_metadata


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    numbers = {"uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 4_000_000_000, "int32": -70000}
    for kind, value in {**numbers, "uint64": 2**63, "int64": -(2**40), "float64": 0.1}.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    writer.add_float32("x.float32", 0.5)
    writer.add_bool("x.bool", True)
    writer.add_string("x.string", "naïve 日本")
    writer.add_array("x.strings", ["", "Ġa", "é"])
    writer.add_array("x.ints", [1, -2, 3])
    writer.add_array("x.floats", [0.5, -1.5])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_every_kind_is_read_as_the_gguf_package_reads_it(file):
    fields = gguf.GGUFReader(file).fields
    expected = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    assert read_metadata(file) == expected
    assert expected["x.strings"] == ["", "Ġa", "é"] and len(expected) == 16


def test_a_file_cut_anywhere_in_its_head_is_refused(file):
    whole = file.read_bytes()
    end = whole.rindex(b"x.floats") + 40  # padding may follow the last value
    for size in range(0, end - 16, 7):
        file.write_bytes(whole[:size])
        with pytest.raises(TokenizerError, match="expected a GGUF file"):
            read_metadata(file)


@pytest.mark.parametrize("content", [b"GGUF\x01\x00\x00\x00" + bytes(16), b"GGML" + bytes(40), b"<html>" + bytes(40)])
def test_another_format_or_version_is_refused(tmp_path, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"x\.gguf: found .*expected a GGUF file"):
        read_metadata(path)


def test_a_damaged_count_is_no_order_for_memory(file):
    whole = bytearray(file.read_bytes())
    count = whole.index(b"x.ints") + len(b"x.ints") + 4 + 4
    whole[count : count + 8] = (2**60).to_bytes(8, "little")
    file.write_bytes(whole)
    with pytest.raises(TokenizerError, match="passes the end"):
        read_metadata(file)


def test_lists_nested_without_end_are_refused(tmp_path):
    path = tmp_path / "deep.gguf"
    head = struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"x", 9)
    path.write_bytes(head + struct.pack("<IQ", 9, 1) * 100_000)
    with pytest.raises(TokenizerError, match="expected a GGUF file"):
        read_metadata(path)
