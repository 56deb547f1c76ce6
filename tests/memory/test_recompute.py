"""How many layers are recomputed, which, and what happens where even that is not enough."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from accessory.checkpoint.load import fill, targets
from accessory.errors import ConfigError
from accessory.memory.plan import MemoryPlan
from accessory.memory.recompute import (
    MARGIN,
    available_memory,
    cgroup_room,
    check_offload,
    choose_layers,
    recompute_layers,
)
from accessory.method import Attachment
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout

WORKER = Path(__file__).parents[1] / "finetune_worker.py"
DATA = Path(__file__).resolve().parents[2] / "data_example" / "accessory_qa.json"
CPU = torch.device("cpu")
ARGS = ModelArgs(dim=64, n_layers=5, n_heads=4, n_kv_heads=2, hidden_dim=160, vocab_size=96)


def plan_of(total: int) -> MemoryPlan:
    """A step that takes `total` bytes."""
    return MemoryPlan(0, 0, 0, 0, 0, 0, 0, working=total)


@pytest.mark.parametrize(("asked", "layers"), [("none", 0), ("all", 6), (0, 0), (4, 4), (6, 6)])
def test_what_is_asked_for(layout: Layout, asked: int | str, layers: int) -> None:
    """Without looking at the memory."""
    assert choose_layers(asked, 6, lambda _: plan_of(1 << 60), layout, "") == (layers, "")


def test_more_layers_than_there_are(layout: Layout) -> None:
    with pytest.raises(ConfigError, match=r"^--checkpointing 7: the model has 6 layers\.$"):
        choose_layers(7, 6, lambda _: plan_of(0), layout, "")


@pytest.mark.parametrize(("full", "layers"), [(0.5, 0), (1.25, 4), (1.45, 6)])
def test_auto_takes_the_fewest_that_fit(layout: Layout, full: float, layers: int) -> None:
    """Each layer spares a tenth of the free memory here; nine tenths of it may be used."""
    free = available_memory(CPU)
    found, why = choose_layers("auto", 6, lambda n: plan_of(int((full - 0.1 * n) * free)), layout, "")
    assert found == layers
    assert MARGIN == 0.1 and why.startswith("fewest that fit into the ") and why.endswith("free, 10% of them spared")


def test_auto_where_nothing_fits(layout: Layout) -> None:
    """Refused, with what would help."""
    free = available_memory(CPU)
    with pytest.raises(ConfigError) as caught:
        choose_layers("auto", 6, lambda n: plan_of(2 * free - n), layout, "--quant, a smaller --max_words")
    message = str(caught.value)
    assert message.startswith(f"--checkpointing auto: a step takes {2 * free / 1e9:.2f} GB even with the layers recomp")
    assert "Try --quant, a smaller --max_words, or --checkpointing all" in message


def test_ranks_agree_on_the_most(torchrun, tmp_path: Path) -> None:
    """One whose step is larger decides for both; they share the memory of their machine."""
    worker = Path(__file__).with_name("recompute_worker.py")
    done = torchrun(2, worker, tmp_path, PYTHONPATH=str(worker.parents[2]))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["1 3", "3 3"]


@pytest.mark.parametrize("offload", [False, True])
def test_the_first_layers_are_recomputed(offload: bool) -> None:
    """And share what moves their inputs."""
    decoder = Decoder(ARGS, dtype=torch.float32)
    recompute_layers(decoder, 3, offload=offload, device=CPU)
    assert [block.recompute for block in decoder.layers] == [True, True, True, False, False]
    movers = {block.offload for block in decoder.layers[:3]}
    assert len(movers) == 1 and (movers != {None}) == offload
    assert {block.offload for block in decoder.layers[3:]} == {None}


class Peak(TorchDispatchMode):
    """The most bytes at a time of all tensors made while it is entered, beside those of which it makes views."""

    def __init__(self, beside: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.beside = {tensor.untyped_storage()._cdata for tensor in beside}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        """Run it, and count what it leaves."""
        made = operation(*args, **(kwargs or {}))
        for store in (t.untyped_storage() for t in tree_leaves(made) if isinstance(t, torch.Tensor)):
            if store._cdata not in self.beside:
                self.alive[store._cdata] = StorageWeakRef(store), store.nbytes()
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return made


def normal(shape: tuple[int, ...]) -> Callable[[torch.Generator], torch.Tensor]:
    """A maker of starting values."""
    return lambda generator: 0.1 * torch.randn(shape, generator=generator)


@pytest.mark.slow
def test_every_recomputed_layer_spares_memory(layout: Layout) -> None:
    """From the first on, and each as much, up to the last, whose activations are made again while the inputs stand."""
    peaks = []
    for layers in (0, *range(6)):  # the first makes what the others find: where documents stand, and masks
        decoder = Decoder(ARGS, dtype=torch.float32)
        initial = {target.name: normal(target.whole_shape(1)) for target in targets(decoder)}
        trained = {name for name in initial if "norm" in name}
        fill(decoder, {}, Attachment(trained, initial), layout, DataParallel(layout, "sdp", base_is_trained=False))
        recompute_layers(decoder.train(), layers, offload=False, device=CPU)
        sequences = decoder.sequences((256,))
        with Peak() as peak:
            decoder(torch.arange(256) % 96, sequences).square().sum().backward()
        peaks.append(peak.bytes)
    spared = [before - after for before, after in itertools.pairwise(peaks[1:])]
    inputs = 4 * 256 * ARGS.dim
    assert min(spared[:4]) > 4 * inputs
    assert max(spared[:4]) - min(spared[:4]) < inputs / 8
    assert abs(spared[4]) < inputs / 8


def test_inputs_are_offloaded_from_gpus_only() -> None:
    check_offload(False, CPU)
    check_offload(True, torch.device("cuda", 0))
    with pytest.raises(ConfigError, match=r"--offload_inputs on --device cpu: .* frees nothing"):
        check_offload(True, CPU)


def group(folder: Path, limit: str, used: int, cached: int, version: int) -> None:
    """A control group's files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{'' if version == 2 else 'total_'}inactive_file {cached}\n")


def test_control_groups_of_version_2(tmp_path: Path) -> None:
    """This one's and those around it, cached files counted as free; those without a limit say nothing."""
    membership, root = tmp_path / "cgroup", tmp_path / "sys"
    membership.write_text("0::/jobs/mine\n")
    assert list(cgroup_room(membership, root)) == []
    group(root / "jobs" / "mine", "max", 10, 0, 2)
    group(root / "jobs", "1000", 700, 100, 2)
    group(root, "500", 600, 0, 2)
    assert list(cgroup_room(membership, root)) == [400, 0]
    assert list(cgroup_room(tmp_path / "missing", root)) == []


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    """The memory controller's tree, among others."""
    membership, root = tmp_path / "cgroup", tmp_path / "sys"
    membership.write_text("5:devices:/mine\n4:cpu,memory:/mine\n0::/\n")
    group(root / "memory" / "mine", "1000", 400, 50, 1)
    assert list(cgroup_room(membership, root)) == [650]


def test_available_memory_is_less_than_all() -> None:
    assert 1e7 < available_memory(CPU) < 1e13


def test_whole_run(tiny_base: Path, lora_config: Path, tmp_path: Path, torchrun) -> None:
    """Over two ranks: no, one, all and as few layers as fit lose the same, and the run says how many it chose."""
    common = [
        *("--pretrained_path", str(tiny_base), "--data_config", str(DATA), "--device", "cpu", "--precision", "fp32"),
        *("--llama_type", "llama_peft", "--llama_config", str(lora_config), "--max_words", "160", "--max_steps", "2"),
        *("--batch_size", "4", "--accum_iter", "2"),
    ]
    asked = {
        "none": [],
        "one": ["--checkpointing", "1"],
        "all": ["--checkpointing"],
        "auto": ["--checkpointing", "auto"],
    }
    jobs = [[*common, *flags, "--output_dir", str(tmp_path / name)] for name, flags in asked.items()]
    (tmp_path / "flags.json").write_text(json.dumps(jobs))
    done = torchrun(2, WORKER, tmp_path / "flags.json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if line.startswith("recomputed layers")]
    assert said[:2] == ["recomputed layers: 1 of 2", "recomputed layers: 2 of 2"]
    assert said[2].startswith("recomputed layers: 0 of 2 (fewest that fit into the ") and len(said) == 3
    losses = {
        name: [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in asked
    }
    assert len(losses["none"]) == 2 and all(values == losses["none"] for values in losses.values())
