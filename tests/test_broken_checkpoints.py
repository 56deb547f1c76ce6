"""What users really have on their disks: each broken input gets one clear message, and nothing is written."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from accessory.blueprint import make_blueprint
from accessory.checkpoint.run_record import with_base
from accessory.errors import AccessoryError
from accessory.export import Destination, convert, open_whole

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 13476838\n"
HTML = b"<!DOCTYPE html><html><body>401 Client Error</body></html>"


class Canary:
    """Unpickled by anything but a safe loader, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def edit_json(path: Path, **changes) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def weights(base: Path) -> Path:
    """The file that holds the tiny model's weights."""
    return base / "model.safetensors"


def truncate(path: Path) -> None:
    """Keep the first two thirds of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def as_bin(base: Path, content: object) -> None:
    """Replace the weights by a pytorch_model.bin."""
    weights(base).unlink()
    torch.save(content, base / "pytorch_model.bin")


def as_shards(base: Path) -> None:
    """An index that names a file which is not there."""
    names = dict.fromkeys(load_file(weights(base)), "model-00001-of-00002.safetensors")
    names["lm_head.weight"] = "model-00002-of-00002.safetensors"
    weights(base).rename(base / "model-00001-of-00002.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def outside(base: Path) -> None:
    """An index that reaches out of the directory."""
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))


def canary_pickle(base: Path) -> None:
    """A .bin with code in it."""
    as_bin(base, {"model.norm.weight": torch.ones(128), "x": Canary(base / "canary")})


def bare_pickle(base: Path) -> None:
    """A .bin that is nothing but a pickle with code in it."""
    weights(base).unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(base / "canary")))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "git_lfs_pointer": (lambda b: weights(b).write_bytes(LFS), "model.safetensors: found a Git-LFS pointer"),
    "html_page": (lambda b: weights(b).write_bytes(HTML), "model.safetensors: found an HTML page"),
    "empty_file": (lambda b: weights(b).write_bytes(b""), "model.safetensors: found an empty file"),
    "cut_short": (lambda b: truncate(weights(b)), "model.safetensors: found .* cannot be read as safetensors"),
    "no_weights": (lambda b: weights(b).unlink(), "model.safetensors or pytorch_model.bin is missing"),
    "missing_shard": (as_shards, "model-00002-of-00002.safetensors is missing"),
    "path_outside": (outside, "names ../../etc/passwd; expected files beside it"),
    "wrong_shape": (
        lambda b: edit_tensors(weights(b), lambda t: t.update({"model.norm.weight": torch.ones(64)})),
        r"norm.weight has shape \(64,\), the model \(128,\)",
    ),
    "missing_key": (
        lambda b: edit_tensors(weights(b), lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "layers.1.feed_forward.w3.weight is missing",
    ),
    "extra_key": (
        lambda b: edit_tensors(weights(b), lambda t: t.update({"model.layers.0.mlp.router.weight": torch.ones(2)})),
        "model.layers.0.mlp.router.weight has no place",
    ),
    "config_is_no_json": (lambda b: (b / "config.json").write_text("{'a': 1}"), "config.json: found a JSON-like text"),
    "config_is_a_list": (lambda b: (b / "config.json").write_text("[]"), "config.json: holds a list"),
    "config_lacks_a_key": (lambda b: edit_json(b / "config.json", hidden_size=None), "'hidden_size' is missing"),
    "config_of_nonsense": (
        lambda b: edit_json(b / "config.json", num_attention_heads=0, num_hidden_layers="two"),
        "(?s)'n_layers' is 'two'.*'n_heads' is 0",
    ),
    "billion_layers": (lambda b: edit_json(b / "config.json", num_hidden_layers=10**9), "'n_layers' is 1000000000"),
    "more_layers": (lambda b: edit_json(b / "config.json", num_hidden_layers=3), "say 3 blocks, its files hold 2"),
    "heads_that_do_not_share": (lambda b: edit_json(b / "config.json", num_key_value_heads=3), "cannot share 3 key"),
    "unknown_family": (
        lambda b: edit_json(b / "config.json", model_type="lama"),
        "model_type 'lama' is not supported. Known: llama, mistral, qwen2",
    ),
    "family_of_another_block": (
        lambda b: edit_json(b / "config.json", model_type="gpt_neox"),
        "(?s)model.layers.0.input_layernorm.weight.* no place in this model.*are missing",
    ),
    "vocabulary_of_another": (
        lambda b: edit_tensors(
            weights(b),
            lambda t: t.update({f"{n}.weight": torch.ones(4000, 128) for n in ("lm_head", "model.embed_tokens")}),
        ),
        "tokenizer has 512 tokens, the model's embedding 4000 rows: they do not belong together",
    ),
    "tokenizer_missing": (lambda b: (b / "tokenizer.json").unlink(), "holds no tokenizer"),
    "tokenizer_is_a_pointer": (lambda b: (b / "tokenizer.json").write_bytes(LFS), "tokenizer.json: found a Git-LFS"),
    "pickle_with_code": (canary_pickle, "pytorch_model.bin: cannot be read as a PyTorch checkpoint of plain tensors"),
    "bare_pickle": (bare_pickle, "pytorch_model.bin: cannot be read as a PyTorch checkpoint of plain tensors"),
    "bin_of_no_tensors": (lambda b: as_bin(b, {"a": 1}), "expected a dictionary of tensors, but found 'a' .int."),
    "bin_is_html": (lambda b: (weights(b).unlink(), (b / "pytorch_model.bin").write_bytes(HTML)), "an HTML page"),
}  # fmt: skip


def snapshot(folder: Path) -> dict[str, int]:
    """Every file below a folder and its size."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_hugging_face_directory(copy, tiny_base: Path, tmp_path: Path, kind: str) -> None:
    """One message that names the fault; the same files as before lie there, and no target."""
    damage, message = BROKEN[kind]
    path = copy(tiny_base)
    damage(path)
    before = snapshot(tmp_path)
    with pytest.raises(AccessoryError, match=message) as caught:
        convert([path], tmp_path / "target", Destination("accessory"))
    assert len(str(caught.value)) < 1500
    assert snapshot(tmp_path) == before
    assert not (path / "canary").exists()


def test_the_canary_would_sing(tmp_path: Path) -> None:
    """Or the tests above would prove nothing."""
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """A directory -> a copy of it that a test may damage."""
    return lambda directory: Path(shutil.copytree(directory, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("lfs.gguf", LFS, "lfs.gguf: found a Git-LFS pointer"),
        ("page.gguf", HTML, "page.gguf: found an HTML page"),
        ("short.gguf", b"GGUF" + struct.pack("<IQQ", 3, 5, 9), "short.gguf: found a GGUF file"),
        ("model.bin", struct.pack("<7i", 64, 172, 5, 8, 4, 512, 512), "model.bin"),
        ("model.bin", LFS, "found a Git-LFS pointer"),
        ("model.pt", b"\x80\x02.", "model.pt: found a binary file"),
    ],
)
def test_broken_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """A single file that is not what its name says."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AccessoryError, match=message):
        convert([tmp_path / name], tmp_path / "target", Destination("accessory"))
    assert snapshot(tmp_path) == {name: len(content)}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["consolidated.00-of-02.model.pth"], r"shards \[1\] are missing"),
        (["consolidated.01.pth"], r"shards \[0\] are missing"),
        (["consolidated.00-of-02.model.pth", "consolidated.01-of-03.model.pth"], "are missing|of one checkpoint"),
    ],
)
def test_incomplete_shards(tmp_path: Path, names: list[str], message: str) -> None:
    """A set of .pth files that lacks one."""
    for name in names:
        torch.save({"model": {"llma.norm.weight": torch.ones(4)}}, tmp_path / name)
    with pytest.raises(AccessoryError, match=message):
        open_whole([tmp_path])


def adapter(base: Path, target: Path, **changes) -> Path:
    """A PEFT adapter of rank 4 on q_proj of the tiny model; `changes` to what its config says."""
    target.mkdir()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
        "base_model_name_or_path": str(base), "bias": "none",
    }  # fmt: skip
    (target / "adapter_config.json").write_text(json.dumps(config | changes))
    width = changes.pop("width", 128)
    tensors = {}
    for i in range(2):
        name = f"base_model.model.model.layers.{i}.self_attn.q_proj"
        tensors |= {f"{name}.lora_A.weight": torch.ones(4, width), f"{name}.lora_B.weight": torch.ones(128, 4)}
    save_file(tensors, target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, r"lora_A.weight|lora_a.weight"),
        ({"width": 192}, "192"),
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"target_modules": ["no_such"]}, "no_such|q_proj"),
    ],
)
def test_adapter_of_another_model(tiny_base: Path, tmp_path: Path, changes: dict, message: str) -> None:
    """Another rank, another base, another kind: refused by name."""
    path = adapter(tiny_base, tmp_path / "adapter", **changes)
    with pytest.raises(AccessoryError, match=message):
        open_whole([tiny_base, path])


def test_right_adapter_is_taken(tiny_base: Path, tmp_path: Path) -> None:
    """So that the refusals above are of what was changed."""
    open_whole([tiny_base, adapter(tiny_base, tmp_path / "adapter")])


def test_wrong_family_is_refused_before_weights(tiny_base: Path) -> None:
    """--llama_type of another family than the checkpoint's names the right one."""
    with pytest.raises(AccessoryError, match="use --llama_type llama_peft"):
        draw(tiny_base, "opt_peft")
    with pytest.raises(AccessoryError, match=r"Did you mean 'llama_peft'\?"):
        draw(tiny_base, "lama_peft")


def draw(base: Path, llama_type: str) -> None:
    """Work out what `llama_type` on `base` is."""
    sources = with_base([base])
    make_blueprint(
        sources,
        llama_type=llama_type,
        llama_config=[],
        tokenizer_path=None,
        quant_type=None,
        precision="bf16",
        train=True,
    )
