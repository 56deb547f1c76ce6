"""What a resumed run goes on from: restored exactly, cut for another layout, refused where it is not whole."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from accessory.checkpoint.training_state import (
    Progress,
    collect_training_state,
    state_record,
)
from accessory.errors import CheckpointError
from accessory.optim import KernelAdamW, build_optimizer, moment_device
from accessory.parallel.groups import Layout
from accessory.parallel.parameters import NamedParameters
from tests.checkpoint.training_state.states import (
    IDENTITY,
    PROGRESS,
    SLICINGS,
    check_that_it_goes_on,
    load,
    new_parameters,
    step,
    write,
)


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


def test_a_resumed_run_goes_on_exactly(trained, tmp_path: Path) -> None:
    """Moments, step count and random generator: the next steps draw and do the same, bit for bit."""
    check_that_it_goes_on(tmp_path, "adamw", *trained)


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


def test_moments_on_the_host_are_saved_from_there() -> None:
    """Paged ones do not fit on the device together. The meta device stands for it."""
    parameters, kept = new_parameters(), {}
    for name, parameter in parameters.items():
        parameters[name] = nn.Parameter(parameter.detach().to("meta"))
    optimizer = KernelAdamW([{"params": list(parameters.values())}], 0.1, paged=True)
    for name, parameter in parameters.items():
        kept[name] = {moment: torch.randn(parameter.shape) for moment in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(1.0), **kept[name]}
        assert moment_device(optimizer, parameter) == torch.device("cpu")
    tensors = collect_training_state(optimizer, NamedParameters(parameters, SLICINGS))
    for name, moments in kept.items():
        for moment, values in moments.items():
            torch.testing.assert_close(tensors[f"{moment}.{name}"], values, rtol=0, atol=0)
