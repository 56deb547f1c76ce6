"""Moments in 8 bits: codes and scales of each rank on the same layout, unpacked and cut for another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from accessory.checkpoint.save import write_json, write_tensors
from accessory.checkpoint.training_state import (
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
from tests.checkpoint.training_state.states import (
    IDENTITY,
    PROGRESS,
    SLICINGS,
    check_that_it_goes_on,
    conditions,
    load,
    saved_by,
    step,
)


def test_a_run_resumed_in_8_bits_goes_on_exactly(trained_in_8_bits, tmp_path: Path) -> None:
    """Codes and scales come back as they were."""
    restored = check_that_it_goes_on(tmp_path, "adamw8bit", *trained_in_8_bits)
    assert restored["wq.weight"]["exp_avg"].dtype == torch.uint8
    assert {name: len(state) for name, state in restored.items()} == {"wq.weight": 5, "wo.weight": 5, "norm.weight": 3}


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
