"""Whatever lies in a file, reading it ends, in time and memory, with what it says or with one of our errors.

Inputs are grown by hypothesis from right ones: a few bytes, values or pieces changed, or made up altogether. `CHAOS`
has each reader tried for minutes instead of seconds.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import resource
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from accessory.checkpoint.manifest import MANIFEST_FILE, manifest_of, verify
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.run_checkpoints import latest_checkpoint
from accessory.checkpoint.run_record import with_base
from accessory.checkpoint.training_state import find_resumption
from accessory.config import FinetuneConfig, parse
from accessory.data.meta_config import load_data_config
from accessory.data.omissions import UnusableRecord
from accessory.data.readers import read_records
from accessory.data.shapes import SHAPES
from accessory.data.templates import documents_of
from accessory.errors import AccessoryError
from accessory.finetuning import finetune
from accessory.tokenizer import open_tokenizer
from tests.conftest import small_sentencepiece
from tests.faults.job import Job

pytestmark = pytest.mark.slow
CHAOS = bool(os.environ.get("CHAOS"))
SECONDS, FEW = 75, 60
"""How long each of the readers is tried in the chaos run, and with how many inputs otherwise."""
SLOWEST, MOST_BYTES = 10.0, 1 << 30


class Tried:
    """Counts what was tried, and stops when the time is over."""

    def __init__(self) -> None:
        self.count = self.refused = 0
        self.until = time.monotonic() + SECONDS if CHAOS else math.inf

    def __call__(self, read: Callable[[], object]) -> None:
        """Read one input. Anything but a result or our own error fails the test, as do too much time and memory."""
        began, before = processor_time(), most_memory()
        self.count += 1
        try:
            read()
        except AccessoryError as error:
            self.refused += 1
            assert str(error)
        assert processor_time() - began < SLOWEST
        assert most_memory() - before < MOST_BYTES


def processor_time() -> float:
    """Seconds of this process and of those that it started and that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def most_memory() -> int:
    """Bytes that this process, or one that it started, has had at once."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def fuzz(inputs: st.SearchStrategy, right: object, read: Callable[[object], object], name: str) -> None:
    """Read what is `right`, which must go through, and `inputs` until the time is over."""
    read(right)
    tried = Tried()

    @settings(
        max_examples=500 if CHAOS else FEW, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck), derandomize=not CHAOS,
    )  # fmt: skip
    @given(inputs)
    def attempt(given_input: object) -> None:
        if time.monotonic() < tried.until:
            tried(lambda: read(given_input))

    while time.monotonic() < tried.until:
        attempt()
        if not CHAOS:
            break
    print(f"\n{name}: {tried.count:,} inputs, {tried.refused:,} of them refused", flush=True)
    assert tried.count > 10 and tried.refused > 0


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("9" * 5000)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with stretches overwritten, taken out, doubled, or cut off; or something else altogether."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(0, 12))
        how = draw(st.sampled_from(["write", "remove", "double", "cut", "deep"]))
        if how == "write":
            data[at : at + length] = draw(st.binary(min_size=1, max_size=12))
        elif how == "remove":
            del data[at : at + length]
        elif how == "double":
            data[at:at] = data[at : at + length] * draw(st.sampled_from([1, 3, 2000]))
        elif how == "deep":
            piece = draw(st.sampled_from([b"[", b'{"a":', b"- ", b"&a *a ", b"\xff\xfe", b"\x00", b"1e999,"]))
            data[at:at] = piece * draw(st.sampled_from([1, 3000]))
        else:
            del data[at:]
    return bytes(data)


@st.composite
def altered(draw: st.DrawFn, value: object) -> object:
    """A JSON value with some of what is in it replaced, removed or renamed."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        changed = {**value, key: draw(altered(value[key]))}
        if draw(st.integers(0, 5)) == 0:
            changed[draw(st.text(max_size=6))] = changed.pop(key)
        return changed
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], draw(altered(value[place])), *value[place + 1 :]]
    return draw(VALUES)


def as_json(value: object) -> bytes:
    """As lenient writers have it, NaN and lone surrogates included."""
    return json.dumps(value, allow_nan=True).encode()


RECORDS = [
    {"instruction": "say a", "input": "b", "output": "a"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
]


def use(path: Path) -> None:
    """Read records and lay them out in all shapes, as a corpus does in one."""
    for record in read_records(path):
        assert record.line > 0
        for shape in SHAPES.values() if record.fault is None else ():
            for layout in ("alpaca", "dialog"):
                try:
                    documents_of(shape.read(record.fields), layout)
                except UnusableRecord as cause:
                    assert str(cause)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "jsonl.gz", "txt"])
def test_fuzz_data(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"data.{suffix}"
    right = {
        "json": as_json(RECORDS),
        "jsonl": b"\n".join(map(as_json, RECORDS)),
        "jsonl.gz": gzip.compress(b"\n".join(map(as_json, RECORDS))),
        "txt": b"say a\n\na",
        "csv": b'instruction\tinput\toutput\nsay a\t"b\nc"\td\n',
    }[suffix]
    inputs = damaged(right)
    if suffix.startswith("json"):
        inputs |= altered(RECORDS).map(as_json)

    def read(content: bytes) -> None:
        path.write_bytes(content)
        use(path)

    fuzz(inputs, right, read, f"data (.{suffix})")


def test_fuzz_data_settings(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(as_json(RECORDS))
    right = {
        "META": [{"path": "data.json", "type": "text", "prompt_type": "alpaca", "ratio": 0.5}, ["data.json", "text"]]
    }
    text = b"META:\n- path: data.json\n  type: text\n  prompt_type: alpaca\n  ratio: 1e-1\n- [data.json, text]\n"

    def read(content: bytes) -> None:
        (tmp_path / "data.yaml").write_bytes(content)
        load_data_config(tmp_path / "data.yaml")

    fuzz(damaged(text) | altered(right).map(as_json), text, read, "data settings (YAML)")


def test_fuzz_model_settings(tiny_base: Path, copy: Callable[[Path], Path]) -> None:
    """config.json, and what --llama_config names, up to the model built without weights."""
    base = copy(tiny_base)
    right = json.loads((base / "config.json").read_text())

    def read(content: bytes) -> None:
        (base / "config.json").write_bytes(content)
        open_source(base)

    fuzz(damaged(as_json(right)) | altered(right).map(as_json), as_json(right), read, "model settings (config.json)")


@pytest.fixture(scope="module")
def saved(tiny_base: Path, dropout_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    job = Job(tiny_base, dropout_lora, tmp_path_factory.mktemp("saved") / "run", {}, ranks=1)
    finetune(parse(FinetuneConfig, job.flags("--max_steps", "1")))
    return job.output / "epoch0-iter1"


def test_fuzz_checkpoint_documents(saved: Path, copy: Callable[[Path], Path]) -> None:
    """manifest.json and the others, of which the manifest then says that they are right."""
    checkpoint = copy(saved)
    names = ("training_state.json", "run.json", "config.json", "meta.json", MANIFEST_FILE)
    right = {name: (checkpoint / name).read_bytes() for name in names}

    def inputs() -> Iterator[st.SearchStrategy]:
        for name, content in right.items():
            changed = damaged(content) | altered(json.loads(content)).map(as_json)
            yield st.tuples(st.just(name), changed)

    def read(given_input: tuple[str, bytes]) -> None:
        name, content = given_input
        for other, whole in right.items():
            (checkpoint / other).write_bytes(whole)
        (checkpoint / name).write_bytes(content)
        if name != MANIFEST_FILE:
            (checkpoint / MANIFEST_FILE).unlink()
            (checkpoint / MANIFEST_FILE).write_text(json.dumps(manifest_of(checkpoint, 1, None)))
        verify(checkpoint)
        latest_checkpoint(checkpoint.parent)
        find_resumption(checkpoint, {}, {})
        open_source(checkpoint)
        with_base([checkpoint])

    fuzz(st.one_of(*inputs()), (names[0], right[names[0]]), read, "checkpoint documents")


def test_fuzz_safetensors_header(tiny_base: Path, copy: Callable[[Path], Path]) -> None:
    """Lengths, offsets, shapes and kinds that are not those of the file."""
    base = copy(tiny_base)
    path = base / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]

    def with_header(value: object) -> bytes:
        written = as_json(value)
        return struct.pack("<Q", len(written)) + written + rest

    lengths = st.integers(0, 2**64 - 1).map(lambda n: struct.pack("<Q", n) + content[8:])

    def read(changed: bytes) -> None:
        path.write_bytes(changed)
        source = open_source(base)
        for tensor in list(source.tensors.values())[:3]:
            tensor.read()

    inputs = damaged(content[: length + 100]) | altered(header).map(with_header) | lengths
    fuzz(inputs, content, read, "safetensors headers")


def test_fuzz_index_of_shards(tiny_base: Path, copy: Callable[[Path], Path]) -> None:
    base = copy(tiny_base)
    names = ("model.norm.weight", "lm_head.weight")
    right = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "a.safetensors")}

    def read(content: bytes) -> None:
        (base / "model.safetensors.index.json").write_bytes(content)
        open_source(base)

    (base / "model.safetensors").rename(base / "a.safetensors")
    fuzz(damaged(as_json(right)) | altered(right).map(as_json), as_json(right), read, "indices of shards")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocabulary.gguf"])
def test_fuzz_tokenizers(name: str, tiny_base: Path, copy: Callable[[Path], Path]) -> None:
    """Opened, and used on a text. Bytes change, and the values that the bytes stand for."""
    base = copy(tiny_base)
    (base / "tokenizer.json").unlink()
    right, inputs = VOCABULARIES[name](tiny_base)

    def read(content: bytes) -> None:
        (base / name).write_bytes(content)
        tokenizer = open_tokenizer(base / name)
        tokenizer.decode(tokenizer.encode("Hello  w\u00f6rld, 1,234 <s> \u65e5\n"))

    fuzz(inputs, right, read, name)


def pipeline_inputs(base: Path) -> tuple[bytes, st.SearchStrategy]:
    """A tokenizer.json."""
    right = (base / "tokenizer.json").read_bytes()
    return right, damaged(right) | altered(json.loads(right)).map(as_json)


def sentencepiece_inputs(_: Path) -> tuple[bytes, st.SearchStrategy]:
    """A tokenizer.model; also with fields of other values, as no random bytes have them."""
    right = small_sentencepiece()
    fields = MessageToDict(ModelProto.FromString(right), preserving_proto_field_name=True)

    def written(changed: object) -> bytes:
        try:
            return ParseDict(changed, ModelProto(), ignore_unknown_fields=True).SerializePartialToString()
        except (ParseError, TypeError, ValueError, AttributeError, RecursionError):
            return b""

    return right, damaged(right) | altered(fields).map(written)


def gguf_inputs(_: Path) -> tuple[bytes, st.SearchStrategy]:
    """The head of a GGUF file."""
    proto = ModelProto.FromString(small_sentencepiece())
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        writer = gguf.GGUFWriter(file.name, "llama")
        writer.add_tokenizer_model("llama")
        writer.add_token_list([piece.piece for piece in proto.pieces])
        writer.add_token_types([piece.type for piece in proto.pieces])
        writer.add_token_scores([piece.score for piece in proto.pieces])
        writer.add_eos_token_id(2)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        right = Path(file.name).read_bytes()
    return right, damaged(right)


VOCABULARIES = {
    "tokenizer.json": pipeline_inputs, "tokenizer.model": sentencepiece_inputs, "vocabulary.gguf": gguf_inputs
}  # fmt: skip
