"""`.pth` checkpoints: which files belong together, how they are cut, and what is refused unread."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from accessory.checkpoint.formats.torch_shards import META_FILE, UPSTREAM_FILE, open_torch_shards, torch_shards
from accessory.checkpoint.load import overlay
from accessory.checkpoint.naming import in_rotary_layout
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import model_args_of
from accessory.errors import CheckpointError


@pytest.mark.parametrize("name", ["meta2", "llama3_2", "upstream2"])
def test_shards_make_the_whole(formats: dict[str, Path], weights, name: str) -> None:
    """Every matrix is joined on the dimension on which Meta cut it; norms are taken once; rope.freqs is left."""
    pattern = UPSTREAM_FILE if name == "upstream2" else META_FILE
    tensors = open_torch_shards(torch_shards(formats[name], pattern))
    assert tensors.keys() == weights.keys()
    for key, weight in weights.items():
        assert tensors[key].shape == weight.shape
        assert torch.equal(tensors[key].read(), weight), key


def test_trained_part_of_upstream(tmp_path: Path) -> None:
    """Biases and LoRA factors are cut as upstream cuts its layers: column ones with their rows, row ones by columns."""
    torch.manual_seed(0)
    column, row = "layers.0.attention.wq", "layers.0.attention.wo"
    whole = {
        f"{column}.bias": (torch.randn(8), 0), f"{column}.lora_a.weight": (torch.randn(2, 8), None),
        f"{column}.lora_b.weight": (torch.randn(8, 2), 0), f"{row}.bias": (torch.randn(8), None),
        f"{row}.lora_a.weight": (torch.randn(2, 8), 1), f"{row}.lora_b.weight": (torch.randn(8, 2), None),
        "norm.weight": (torch.randn(8), None), "prefix": (torch.randn(2, 1, 3, 8), None),
        "prefix_gate": (torch.randn(2, 4), 1), "prefix_new_gate": (torch.randn(2), None),
    }  # fmt: skip
    for rank in range(2):
        state = {f"llma.{k}": v if dim is None else v.chunk(2, dim)[rank].clone() for k, (v, dim) in whole.items()}
        torch.save({"model": state}, tmp_path / f"consolidated.{rank:02d}-of-02.model.pth")
    source = open_source(tmp_path)
    assert source.is_delta and not source.is_difference and source.format == "LLaMA2-Accessory"
    assert {name: tensor.shape for name, tensor in source.tensors.items()} == {
        name: tuple(value.shape) for name, (value, _) in whole.items()
    }
    assert all(torch.equal(source.tensors[name].read(), value) for name, (value, _) in whole.items())


def test_shards_are_in_rank_order(tmp_path: Path) -> None:
    """By number, not by name; other files beside them are not theirs."""
    for name in ("consolidated.10.pth", "consolidated.9.pth", *(f"consolidated.{i}.pth" for i in range(9)), "a.pth"):
        (tmp_path / name).touch()
    assert [path.name for path in torch_shards(tmp_path, META_FILE)] == [f"consolidated.{i}.pth" for i in range(11)]
    assert torch_shards(tmp_path, UPSTREAM_FILE) == torch_shards(tmp_path.parent, META_FILE) == []


@pytest.mark.parametrize(("name", "gone"), [
    ("meta2", "consolidated.00.pth"), ("upstream2", "consolidated.00-of-02.model.pth"),
    ("upstream2", "consolidated.01-of-02.model.pth"),
])  # fmt: skip
def test_missing_shard(formats: dict[str, Path], copy, name: str, gone: str) -> None:
    """The message says which are there and which number is not."""
    directory = copy(formats[name])
    (directory / gone).unlink()
    left = next(iter(directory.glob("consolidated*"))).name
    with pytest.raises(CheckpointError) as caught:
        open_source(directory)
    missing = int(gone.split(".")[1].split("-")[0])
    assert str(caught.value) == f"{directory}: shards [{missing}] are missing; found {left}."


def test_shards_of_two_checkpoints(formats: dict[str, Path], copy) -> None:
    """Files cut for one and for two ranks in one directory."""
    directory = copy(formats["upstream2"])
    (directory / "consolidated.00-of-01.model.pth").touch()
    with pytest.raises(CheckpointError, match=r"00-of-01.*01-of-02.*expected the shards of one checkpoint"):
        open_source(directory)


def test_tensor_missing_in_one_shard(formats: dict[str, Path], copy) -> None:
    """Shards of different runs, or one written badly."""
    directory = copy(formats["meta2"])
    state = torch.load(directory / "consolidated.01.pth")
    torch.save({k: v for k, v in state.items() if "wo" not in k}, directory / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match=r"not every shard holds layers\.0\.attention\.wo\.weight, layers\.1"):
        open_source(directory)


def test_what_is_no_checkpoint(tmp_path: Path, fake: tuple[str, bytes]) -> None:
    """Downloads gone wrong are named for what they are."""
    what, content = fake
    (tmp_path / "consolidated.00.pth").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_source(tmp_path)
    assert str(tmp_path / "consolidated.00.pth") in str(caught.value)
    assert what in str(caught.value)
    assert "expected" in str(caught.value).lower() or "PyTorch checkpoint" in str(caught.value)


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.9999])
def test_truncated(formats: dict[str, Path], copy, kept: float) -> None:
    """A download that stopped is noticed wherever it did."""
    directory = copy(formats["meta1"])
    path = directory / "consolidated.00.pth"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth.*truncated"):
        open_source(directory)


class Bomb:
    """Unpickling this runs a command."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("name", ["consolidated.00.pth", "consolidated.00-of-01.model.pth"])
def test_code_inside_is_never_run(tmp_path: Path, name: str) -> None:
    """The file is refused by name, and the canary does not sing; PyTorch's own unsafe way would have let it."""
    canary = tmp_path / "canary"
    torch.save({"model": {"norm.weight": torch.ones(2), "x": Bomb(canary)}}, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name}.*plain tensors"):
        open_source(tmp_path)
    assert not canary.exists()
    torch.load(tmp_path / name, weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize(("content", "found"), [
    ([torch.ones(2)], "holds a list"), (torch.ones(2), "holds a Tensor"), ({"model": [1]}, "holds a list"),
    ({"epoch": 3, "norm.weight": torch.ones(2)}, r"found 'epoch' \(int\)"),
])  # fmt: skip
def test_other_contents(tmp_path: Path, content: object, found: str) -> None:
    """Files of PyTorch that hold no model."""
    torch.save(content, tmp_path / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=rf"consolidated\.00\.pth.*{found}|consolidated\.00\.pth: {found}"):
        open_source(tmp_path)


def write_difference(directory: Path, base: dict[str, torch.Tensor], ranks: int) -> dict[str, torch.Tensor]:
    """A full fine-tuning as LLaMA2-Accessory stores it: what was added to each weight, cut over ranks; returns it."""
    torch.manual_seed(1)
    added = {name: 0.01 * torch.randn(weight.shape) for name, weight in base.items()}
    cuts = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1, "tok_embeddings": 1}
    for rank in range(ranks):
        state = {}
        for name, value in added.items():
            dim = cuts.get(name.split(".")[-2])
            state[f"llma.{name}"] = value if dim is None else value.chunk(ranks, dim)[rank].clone()
        torch.save({"model": state}, directory / f"consolidated.{rank:02d}-of-{ranks:02d}.model-diff.pth")
    return added


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["meta2", "upstream1", "hf"])
def test_differences_are_added(formats: dict[str, Path], weights, tmp_path: Path, name: str, ranks: int) -> None:
    """To the base before them, whatever its format and row order: each value and each rank's slice of it."""
    added = write_difference(tmp_path, weights, ranks)
    base, difference = open_source(formats[name]), open_source(tmp_path)
    assert difference.is_difference and difference.is_delta
    assert difference.format == "LLaMA2-Accessory (difference)"
    args = model_args_of(base)
    found, origin = overlay([base, difference], args)
    pairs = in_rotary_layout(found, args, args.rotary_layout, "pairs")
    assert pairs.keys() == weights.keys()
    for key, weight in weights.items():
        assert torch.equal(pairs[key].read(), weight + added[key]), key
        assert origin[key] is difference
    row = found["layers.1.attention.wo.weight"]
    assert torch.equal(row.read(1, 64, 128), row.read()[:, 64:])


def test_a_difference_to_nothing_is_refused(formats: dict[str, Path], weights, tmp_path: Path) -> None:
    """Without a base before it, or behind its base the wrong way round."""
    write_difference(tmp_path, weights, 1)
    base, difference = open_source(formats["meta1"]), open_source(tmp_path)
    for sources in ([difference], [difference, base]):
        with pytest.raises(CheckpointError, match=f"{tmp_path}: adds to .* which are in no checkpoint before it"):
            overlay(sources, model_args_of(base))
