"""What a resumed run goes on from: restored exactly, recut for another layout, refused for another run."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from accessory.checkpoint.save import write_json, write_tensors
from accessory.checkpoint.training_state import (
    Progress,
    Resumption,
    collect_training_state,
    find_resumption,
    restore_training_state,
    state_record,
)
from accessory.errors import CheckpointError
from accessory.optim import build_optimizer
from accessory.parallel.groups import Layout
from accessory.parallel.parameters import NamedParameters
from accessory.parallel.tensor import Slicing
from accessory.quant.moments import pack_moment, unpack_moment

SLICINGS = {"wq.weight": Slicing(dim=0), "wo.weight": Slicing(dim=1), "norm.weight": Slicing(partial=True)}
IDENTITY = {
    "llama_type": "llama_peft", "settings": {"lora_rank": 4, "lora_targets": ["wq", "wo"]}, "seed": 0,
    "data": {"max_words": 1024, "META": [{"prompt_type": "alpaca", "content": "ab"}]},
    "global_batch": 16, "quantization": None, "optim": "adamw", "base": "ef56", "precision": "bf16", "lr": 1e-4,
    "min_lr": 1e-5, "warmup_epochs": 0.1, "epochs": 3, "weight_decay": 0.02, "clip_grad": 2.0,
    "lr_schedule": "cosine", "adam_beta2": 0.95,
}  # fmt: skip
OTHER = {
    "llama_type": "llama", "settings": {"lora_rank": 8, "lora_targets": ["wq", "wo"]}, "seed": 1,
    "data": {"max_words": 512, "META": [{"prompt_type": "none", "content": "ab"}]},
    "global_batch": 8, "quantization": "nf4", "optim": "adamw8bit", "base": "0a1b", "precision": "fp16", "lr": 2e-4,
    "min_lr": 0.0, "warmup_epochs": 0.2, "epochs": 4, "weight_decay": 0.0, "clip_grad": -1.0,
    "lr_schedule": "constant", "adam_beta2": 0.999,
}  # fmt: skip
PROGRESS = Progress(epoch=1, step=2, total_steps=7, loss_scale=1024.0, good_steps=3)


def new_parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    """Three parameters of different shapes."""
    torch.manual_seed(seed)
    shapes = {"wq.weight": (8, 6), "wo.weight": (6, 8), "norm.weight": (6,)}
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def step(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """One optimizer step on random gradients."""
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def write(directory: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """As the checkpoint writer does."""
    state = collect_training_state(optimizer, NamedParameters(parameters, SLICINGS))
    write_tensors(directory, "training_state", state.items())
    write_json(directory / "training_state.json", state_record(PROGRESS, IDENTITY, conditions(Layout())))


def conditions(layout: Layout) -> dict:
    """What must be equal for a run to go on bit for bit."""
    return {"world_size": layout.world_size, "mp_size": layout.mp_size, "threads": 2}


def load(
    directory: Path, parameters: dict[str, nn.Parameter], optimizer, layout: Layout | None = None, allowed=(), **changes
) -> Resumption:
    """As a resumed run does."""
    layout = layout or Layout()
    found = find_resumption(directory, IDENTITY | changes, conditions(layout), allowed)
    restore_training_state(found, optimizer, NamedParameters(parameters, SLICINGS), layout)
    return found


def saved_by(directory: Path, ranks: int, mp_size: int) -> None:
    """Say that what lies there was saved by as many ranks."""
    path = directory / "training_state.json"
    record = json.loads(path.read_text())
    record["conditions"] |= {"world_size": ranks, "mp_size": mp_size}
    path.write_text(json.dumps(record))


def test_progress_moves_on() -> None:
    """Within an epoch and to the next; skipped steps count too, those in a row apart."""
    progress = Progress(epoch=1, step=2, total_steps=7)
    assert progress.checkpoint_name == "epoch1-iter2"
    progress.advance(4, skipped=True)
    assert progress == Progress(epoch=1, step=3, total_steps=8, skipped=1)
    progress.advance(4, skipped=False)
    assert progress == Progress(epoch=2, step=0, total_steps=9) and progress.checkpoint_name == "epoch1"


def test_loss_scale_grows_and_backs_off() -> None:
    """Doubled after every 2000 good steps in a row, halved at once after a bad one, never below 1."""
    progress = Progress()
    assert progress.loss_scale == 65536

    def after(steps: int, finite: bool = True) -> float:
        for _ in range(steps):
            progress.rescale(finite)
        return progress.loss_scale

    assert [after(1999), after(1), after(1999)] == [65536, 131072, 131072] and progress.good_steps == 3999
    assert (after(1, finite=False), progress.good_steps) == (65536, 0)
    assert [after(1999), after(1), after(2000)] == [65536, 131072, 262144]
    assert after(40, finite=False) == 1


@pytest.fixture
def trained(tmp_path: Path) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """Parameters and optimizer after three steps, whose state lies in tmp_path."""
    parameters = new_parameters()
    optimizer = build_optimizer("adamw", parameters, 0.1, 0.1)
    for _ in range(3):
        step(parameters, optimizer)
    write(tmp_path, parameters, optimizer)
    return parameters, optimizer


def test_a_resumed_run_goes_on_exactly(trained, tmp_path: Path) -> None:
    """Moments, step count and random generator: the next steps draw and do the same, bit for bit."""
    parameters, optimizer = trained
    copies = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
    for _ in range(2):
        step(parameters, optimizer)
    torch.manual_seed(99)
    resumed = build_optimizer("adamw", copies, 0.1, 0.1)
    assert load(tmp_path, copies, resumed) == Resumption(tmp_path, PROGRESS, 1, 1, (), ())
    for _ in range(2):
        step(copies, resumed)
    for name, parameter in parameters.items():
        assert torch.equal(copies[name], parameter), name
        ours, theirs = resumed.state[copies[name]], optimizer.state[parameter]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.fixture
def trained_in_8_bits(tmp_path: Path) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """As `trained`, with parameters that are large enough for it, and a small one."""
    torch.manual_seed(0)
    shapes = {"wq.weight": (64, 100), "wo.weight": (90, 64), "norm.weight": (6,)}
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    optimizer = build_optimizer("adamw8bit", parameters, 0.1, 0.1)
    for _ in range(3):
        step(parameters, optimizer)
    write(tmp_path, parameters, optimizer)
    return parameters, optimizer


def test_a_run_resumed_in_8_bits_goes_on_exactly(trained_in_8_bits, tmp_path: Path) -> None:
    """Codes and scales come back as they were."""
    parameters, optimizer = trained_in_8_bits
    copies = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
    for _ in range(2):
        step(parameters, optimizer)
    resumed = build_optimizer("adamw8bit", copies, 0.1, 0.1)
    assert load(tmp_path, copies, resumed) == Resumption(tmp_path, PROGRESS, 1, 1, (), ())
    assert resumed.state[copies["wq.weight"]]["exp_avg"].dtype == torch.uint8
    for _ in range(2):
        step(copies, resumed)
    for name, parameter in parameters.items():
        assert torch.equal(copies[name], parameter), name
        ours, theirs = resumed.state[copies[name]], optimizer.state[parameter]
        assert ours.keys() == theirs.keys() and len(ours) == (3 if name == "norm.weight" else 5)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_8_bit_moments_of_four_ranks_for_one(trained_in_8_bits, tmp_path: Path) -> None:
    """Two slices of two shards each, quantized one by one: each is unpacked with its own scales, then put together."""
    parameters, _ = trained_in_8_bits
    path = tmp_path / "training_state.safetensors"
    saved, expected = load_file(path), {}
    for name in ("wq.weight", "wo.weight"):
        for moment, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            values = torch.randn(parameters[name].shape)
            values = values if signed else values.square()
            codes, slices = [], []
            for mp_rank, part in enumerate(values.chunk(2, SLICINGS[name].dim)):
                packed = [pack_moment(shard, signed) for shard in part.chunk(2)]
                for dp_rank, (_, scales) in enumerate(packed):
                    saved[f"{moment}_scales.{name}.{2 * dp_rank + mp_rank}"] = scales
                codes.append(torch.cat([code for code, _ in packed]))
                slices.append(torch.cat([unpack_moment(code, scales, signed) for code, scales in packed]))
            saved[f"{moment}.{name}"] = torch.cat(codes, SLICINGS[name].dim).contiguous()
            expected[name, moment] = torch.cat(slices, SLICINGS[name].dim)
    saved |= {f"generator.cpu.{rank}": torch.get_rng_state() for rank in range(4)}
    save_file(saved, path)
    saved_by(tmp_path, 4, 2)
    optimizer = build_optimizer("adamw8bit", parameters, 0.1, 0.1)
    inexact = ("world_size was 4, is 1", "mp_size was 2, is 1")
    assert load(tmp_path, parameters, optimizer) == Resumption(tmp_path, PROGRESS, 4, 2, (), inexact)
    for (name, moment), values in expected.items():
        assert torch.equal(optimizer.state[parameters[name]][moment], values)
    step(parameters, optimizer)
    for (name, moment), values in expected.items():
        state, gradient = optimizer.state[parameters[name]], parameters[name].grad
        signed = moment == "exp_avg"
        wanted = 0.9 * values + 0.1 * gradient if signed else 0.95 * values + 0.05 * gradient.square()
        found = unpack_moment(state[moment], state[f"{moment}_scales"], signed)
        assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()  # packed twice


def test_8_bit_moments_of_one_rank_for_two(trained_in_8_bits, tmp_path: Path) -> None:
    """Each takes its slice of the values, and packs it again as it steps."""
    parameters, optimizer = trained_in_8_bits
    for rank in range(2):
        cut = {
            name: nn.Parameter(p if SLICINGS[name].dim is None else p.chunk(2, SLICINGS[name].dim)[rank].clone())
            for name, p in parameters.items()
        }
        resumed = build_optimizer("adamw8bit", cut, 0.1, 0.1)
        load(tmp_path, cut, resumed, Layout(rank=rank, world_size=2, mp_rank=rank, mp_size=2))
        for name, moment, signed in (("wq.weight", "exp_avg", True), ("wo.weight", "exp_avg_sq", False)):
            state = optimizer.state[parameters[name]]
            values = unpack_moment(state[moment], state[f"{moment}_scales"], signed)
            mine = values.chunk(2, SLICINGS[name].dim)[rank]
            assert torch.equal(resumed.state[cut[name]][moment], mine)
        step(cut, resumed)


@pytest.mark.usefixtures("trained_in_8_bits")
def test_padded_slices_hold_the_code_of_zero(tmp_path: Path) -> None:
    """A head whose rows the ranks do not divide: its padding must not become moments of its own."""
    path = tmp_path / "training_state.safetensors"
    saved, padded = load_file(path), Slicing(dim=0, whole=64)
    for moment in ("exp_avg", "exp_avg_sq"):  # 22 rows a rank, two of the last's being padding
        saved |= {f"{moment}_scales.wq.weight.{rank}": torch.ones(9) for rank in range(3)}
    saved |= {f"generator.cpu.{rank}": torch.get_rng_state() for rank in range(3)}
    save_file(saved, path)
    saved_by(tmp_path, 3, 3)
    cut = {"wq.weight": nn.Parameter(torch.zeros(22, 100))}
    optimizer = build_optimizer("adamw8bit", cut, 0.1, 0.1)
    layout = Layout(rank=2, world_size=3, mp_rank=2, mp_size=3)
    found = find_resumption(tmp_path, IDENTITY, conditions(layout))
    restore_training_state(found, optimizer, NamedParameters(cut, {"wq.weight": padded}), layout)
    state = optimizer.state[cut["wq.weight"]]
    for moment, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        values = unpack_moment(state[moment], state[f"{moment}_scales"], signed)
        assert not values[20:].any() and values[:20].any()


@pytest.mark.usefixtures("trained_in_8_bits")
def test_padding_is_no_moment_on_another_layout(tmp_path: Path) -> None:
    """What three ranks saved of a matrix of 64 rows, in 8 bits, for one rank: its last slice was padded."""
    path = tmp_path / "training_state.safetensors"
    saved, padded, wanted = load_file(path), Slicing(dim=0, whole=64), {}
    for moment, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        values = torch.randn(64, 100)
        values = values if signed else values.square()
        packed = [pack_moment(part, signed) for part in nn.functional.pad(values, (0, 0, 0, 2)).split(22)]
        saved |= {f"{moment}_scales.wq.weight.{rank}": scales for rank, (_, scales) in enumerate(packed)}
        saved[f"{moment}.wq.weight"] = torch.cat([codes for codes, _ in packed])[:64]
        wanted[moment] = torch.cat([unpack_moment(codes, scales, signed) for codes, scales in packed])[:64]
    saved |= {f"generator.cpu.{rank}": torch.get_rng_state() for rank in range(3)}
    save_file(saved, path)
    saved_by(tmp_path, 3, 3)
    parameter = nn.Parameter(torch.zeros(64, 100))
    optimizer = build_optimizer("adamw8bit", {"wq.weight": parameter}, 0.1, 0.1)
    found = find_resumption(tmp_path, IDENTITY, conditions(Layout()))
    parameters = NamedParameters({"wq.weight": parameter}, {"wq.weight": padded})
    restore_training_state(found, optimizer, parameters, Layout())
    assert all(torch.equal(optimizer.state[parameter][moment], values) for moment, values in wanted.items())


def test_a_parameter_that_is_not_cut_in_8_bits_from_two_replicas(tmp_path: Path) -> None:
    """The only one there is; each of two data-parallel ranks quantized its shard."""
    torch.manual_seed(0)
    parameters = NamedParameters({"w": nn.Parameter(torch.randn(64, 100))}, {"w": Slicing()})
    optimizer = build_optimizer("adamw8bit", parameters, 0.1, 0.1)
    step(parameters, optimizer)
    saved, wanted = collect_training_state(optimizer, parameters), {}
    assert saved["step"] == 1
    for moment, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        shards = [pack_moment(shard.square(), signed) for shard in parameters["w"].detach().chunk(2)]
        saved[f"{moment}.w"] = torch.cat([codes for codes, _ in shards])
        saved |= {f"{moment}_scales.w.{rank}": scales for rank, (_, scales) in enumerate(shards)}
        wanted[moment] = torch.cat([unpack_moment(codes, scales, signed) for codes, scales in shards])
    write_tensors(tmp_path, "training_state", (saved | {"generator.cpu.1": torch.get_rng_state()}).items())
    write_json(tmp_path / "training_state.json", state_record(PROGRESS, IDENTITY, conditions(Layout(world_size=2))))
    found = find_resumption(tmp_path, IDENTITY, conditions(Layout()))
    restore_training_state(found, optimizer, parameters, Layout())
    assert all(torch.equal(optimizer.state[parameters["w"]][moment], values) for moment, values in wanted.items())


def test_five_of_what_is_missing_are_named(trained_in_8_bits, tmp_path: Path) -> None:
    """Generators, then moments, then scales."""
    path = tmp_path / "training_state.safetensors"
    saved_by(tmp_path, 7, 1)
    names = ", ".join(f"generator.cpu.{rank}" for rank in range(1, 6))
    with pytest.raises(CheckpointError, match=rf": {re.escape(names)} is missing; expected the generators of 7 ranks"):
        load(tmp_path, *trained_in_8_bits)
    saved = load_file(path) | {f"generator.cpu.{rank}": torch.get_rng_state() for rank in range(7)}
    save_file(saved, path)
    names = ", ".join(f"exp_avg_scales.wq.weight.{rank}" for rank in range(1, 6))
    with pytest.raises(CheckpointError, match=rf": {re.escape(names)} is missing; expected the scales of 8-bit"):
        load(tmp_path, *trained_in_8_bits)
    moments = {"exp_avg.other": torch.ones(1)}
    save_file({name: t for name, t in saved.items() if not name.startswith("exp")} | moments, path)
    names = ", ".join([f"exp_avg.{name}" for name in SLICINGS] + [f"exp_avg_sq.{name}" for name in SLICINGS][:2])
    with pytest.raises(CheckpointError, match=rf": {re.escape(names)} is missing; expected the moments of what"):
        load(tmp_path, *trained_in_8_bits)


def test_missing_scales(trained_in_8_bits, tmp_path: Path) -> None:
    path = tmp_path / "training_state.safetensors"
    saved = load_file(path)
    del saved["exp_avg_sq_scales.wo.weight.0"]
    save_file(saved, path)
    with pytest.raises(CheckpointError, match=r"exp_avg_sq_scales\.wo\.weight\.0 is missing; expected the scales"):
        load(tmp_path, *trained_in_8_bits)


def test_step_count_is_the_optimizers(trained, tmp_path: Path) -> None:
    """Not the run's, which counts steps that fp16 skipped; a state that does not tell it means the run's."""
    parameters, _ = trained
    optimizer = build_optimizer("adamw", parameters, 0.1, 0.1)
    load(tmp_path, parameters, optimizer)
    assert {state["step"].item() for state in optimizer.state.values()} == {3.0}
    saved = load_file(tmp_path / "training_state.safetensors")
    del saved["step"]
    save_file(saved, tmp_path / "training_state.safetensors")
    load(tmp_path, parameters, optimizer)
    assert {state["step"].item() for state in optimizer.state.values()} == {7.0}


def test_every_step_count_is_its_own(trained, tmp_path: Path) -> None:
    """Parameters must not count on one shared tensor."""
    parameters, _ = trained
    optimizer = build_optimizer("adamw", parameters, 0.1, 0.1)
    load(tmp_path, parameters, optimizer)
    step(parameters, optimizer)
    assert {state["step"].item() for state in optimizer.state.values()} == {4.0}


def test_moments_are_cut_for_another_layout(trained, tmp_path: Path) -> None:
    """Each of two ranks takes its slice of what one saved, and is told that its generators are not restored."""
    parameters, optimizer = trained
    torch.manual_seed(5)
    state = torch.get_rng_state()
    parts = []
    for rank in range(2):
        cut = {
            name: nn.Parameter(p if SLICINGS[name].dim is None else p.chunk(2, SLICINGS[name].dim)[rank].clone())
            for name, p in parameters.items()
        }
        resumed = build_optimizer("adamw", cut, 0.1, 0.1)
        found = load(tmp_path, cut, resumed, Layout(rank=rank, world_size=2, mp_rank=rank, mp_size=2))
        assert found.inexact == ("world_size was 1, is 2", "mp_size was 1, is 2")
        assert all(resumed.state[p]["exp_avg"].shape == p.shape for p in cut.values())
        assert all(resumed.state[p]["exp_avg"].is_contiguous() for p in cut.values())
        parts.append({name: resumed.state[p] for name, p in cut.items()})
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in parameters.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            values, dim = [part[name][moment] for part in parts], SLICINGS[name].dim
            whole = values[0] if dim is None else torch.cat(values, dim)
            assert torch.equal(whole, optimizer.state[parameter][moment]), name


@pytest.mark.parametrize("field", [field for field in IDENTITY if field not in ("settings", "data")])
def test_another_run_is_refused(trained, tmp_path: Path, field: str) -> None:
    """Field by field, with both values."""
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, *trained, **{field: OTHER[field]})
    fixed = field in ("llama_type", "settings", "optim")  # nothing would fit
    hint = "" if fixed else f" To go on all the same: --allow_changed {field}."
    assert str(caught.value) == (
        f"{tmp_path}: belongs to another run: {field} was {IDENTITY[field]!r}, is {OTHER[field]!r}.{hint}"
    )


def test_of_many_values_those_that_differ_are_named(trained, tmp_path: Path) -> None:
    """By the user's own names, not as two digests or two long lists."""
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, *trained, settings=OTHER["settings"], data=OTHER["data"])
    assert str(caught.value) == (
        f"{tmp_path}: belongs to another run: settings.lora_rank was 4, is 8; data.max_words was 1024, is 512; "
        "data.META[0].prompt_type was 'alpaca', is 'none'."
    )
    with pytest.raises(CheckpointError, match=r"data\.META was \[.*'ab'.*\], is \[\]\. To go on all the same"):
        load(tmp_path, *trained, data={"max_words": 1024, "META": []})


def test_data_that_an_earlier_version_knew_by_a_digest_are_another(trained, tmp_path: Path) -> None:
    record = tmp_path / "training_state.json"
    saved = json.loads(record.read_text())
    saved["identity"]["data"] = "ab12"
    record.write_text(json.dumps(saved))
    said = "recorded by an earlier version, which does not tell what in it differs now"
    words = rf"data was 'ab12', {said}\. To go on .*--allow_changed data"
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path, *trained)
    assert load(tmp_path, *trained, allowed=("data",)).changed == ("data",)


def test_what_an_earlier_version_did_without_a_flag(trained, tmp_path: Path) -> None:
    """Its runs go on: they had a cosine and a second beta of 0.95."""
    record = tmp_path / "training_state.json"
    saved = json.loads(record.read_text())
    del saved["identity"]["lr_schedule"], saved["identity"]["adam_beta2"]
    record.write_text(json.dumps(saved))
    assert load(tmp_path, *trained).changed == ()
    with pytest.raises(CheckpointError, match=r"adam_beta2 was 0\.95, is 0\.999\. .*--allow_changed adam_beta2"):
        load(tmp_path, *trained, adam_beta2=0.999)


def test_what_followed_from_the_base_was_recorded_as_null(trained, tmp_path: Path) -> None:
    """It is a number now, so that the run goes on whatever follows from the base in this version."""
    record = tmp_path / "training_state.json"
    saved = json.loads(record.read_text())
    saved["identity"]["settings"] |= {"tail": None, "side_heads": None}
    record.write_text(json.dumps(saved))
    now = IDENTITY["settings"] | {"tail": 1, "side_heads": None}
    assert load(tmp_path, *trained, settings=now).changed == ()
    saved["identity"]["settings"]["tail"] = 2
    record.write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match=r"settings\.tail was 2, is 1"):
        load(tmp_path, *trained, settings=now)


def test_all_differences_are_named(trained, tmp_path: Path) -> None:
    """At once."""
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, *trained, **OTHER)
    assert all(re.search(rf"\b{field}\S* was", str(caught.value)) for field in IDENTITY)


@pytest.mark.parametrize("gone", ["training_state.json", "training_state.safetensors"])
def test_missing_file(trained, tmp_path: Path, gone: str) -> None:
    """A checkpoint that is only a model."""
    (tmp_path / gone).unlink()
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: holds no training state.*expected training_state\.json"):
        load(tmp_path, *trained)


def test_damaged_files(trained, tmp_path: Path) -> None:
    """Cut short, of another kind, and without a parameter's moments."""
    path = tmp_path / "training_state.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match=r"training_state\.safetensors: found a binary file of .* as safetensors"):
        load(tmp_path, *trained)
    path.write_bytes(content)
    saved = load_file(path)
    del saved["exp_avg_sq.wo.weight"]
    save_file(saved, path)
    with pytest.raises(CheckpointError, match=r"training_state\.safetensors: exp_avg_sq\.wo\.weight is missing"):
        load(tmp_path, *trained)
    (tmp_path / "training_state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"training_state\.json: found a JSON-like text"):
        load(tmp_path, *trained)


def test_optimizer_that_has_not_stepped(tmp_path: Path) -> None:
    """fp16 may skip every step so far: there are no moments, and the resumed optimizer starts without."""
    parameters = new_parameters()
    write(tmp_path, parameters, build_optimizer("adamw", parameters, 0.1, 0.1))
    optimizer = build_optimizer("adamw", parameters, 0.1, 0.1)
    assert load(tmp_path, parameters, optimizer).progress == PROGRESS
    assert not optimizer.state
    step(parameters, optimizer)


def test_record_is_json(tmp_path: Path) -> None:
    """And keeps its values."""
    record = json.loads(json.dumps(state_record(PROGRESS, IDENTITY, {"threads": 2})))
    assert Progress(**record["progress"]) == PROGRESS
    assert Progress() == Progress(0, 0, 0, 65536.0, 0, 0)
    assert record["identity"] == IDENTITY and record["conditions"] == {"threads": 2}


def test_what_is_allowed_may_differ_and_is_told(trained, tmp_path: Path) -> None:
    found = load(tmp_path, *trained, allowed=("seed", "data"), seed=1, data=OTHER["data"])
    assert found.changed == ("seed", "data") and not found.inexact
    with pytest.raises(
        CheckpointError, match=r"run: global_batch was 16, is 8\. .*--allow_changed seed global_batch\."
    ):
        load(tmp_path, *trained, allowed=("seed",), seed=1, global_batch=8)
    with pytest.raises(CheckpointError, match=r"seed was .*; data.max_words was .*--allow_changed seed data\.$"):
        load(tmp_path, *trained, seed=1, data=OTHER["data"])
    with pytest.raises(CheckpointError, match=r"lora_rank.*\.$") as refused:
        load(tmp_path, *trained, settings={"lora_rank": 8})
    assert "--allow_changed" not in str(refused.value)


def test_what_follows_from_a_change_need_not_be_allowed(trained, tmp_path: Path) -> None:
    now, how = IDENTITY | {"seed": 1, "global_batch": 8}, (conditions(Layout()),)
    with pytest.raises(CheckpointError, match=r"seed was .*; global_batch was 16, .*: --allow_changed seed\.$"):
        find_resumption(tmp_path, now, *how, follows={"global_batch": "seed"})
    found = find_resumption(tmp_path, now, *how, ("seed",), {"global_batch": "seed"})
    assert found.changed == ("seed", "global_batch")


def test_generators_that_are_missing(trained, tmp_path: Path) -> None:
    """It would go on, but draw other dropout than the run that was saved."""
    path = tmp_path / "training_state.safetensors"
    saved = load_file(path)
    del saved["generator.cpu.0"]
    save_file(saved, path)
    with pytest.raises(CheckpointError, match=r"generator\.cpu\.0 is missing; expected the generators of 1 ranks"):
        load(tmp_path, *trained)


@pytest.mark.parametrize("change", [
    {"progress": None}, {"identity": []}, {"conditions": {}}, {"progress": {"epoch": 1}},
    {"conditions": {"mp_size": 1}}, {"progress": {**asdict(PROGRESS), "step": "2"}},
    {"progress": {**asdict(PROGRESS), "step": 2.5}}, {"progress": {**asdict(PROGRESS), "other": 1}},
], ids=str)  # fmt: skip
def test_records_of_another_kind(change: dict, trained, tmp_path: Path) -> None:
    path = tmp_path / "training_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=r"training_state\.json: expected|is no training state"):
        load(tmp_path, *trained)
