"""Groups, steps, moments and clipping, against formulas and PyTorch's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import bitsandbytes
import pytest
import torch
from torch import nn

from accessory.engine import Engine, StepSettings
from accessory.optim import (
    BETAS,
    OPTIMIZERS,
    build_optimizer,
    state_bytes,
)
from accessory.parallel import groups
from accessory.parallel.parameters import NamedParameters
from accessory.quant.moments import unpack_moment
from accessory.run.schedule import Schedule
from accessory.run.signals import StopSignals
from tests.parallel.four_parameters import SLICINGS, four_parameters


@pytest.fixture(scope="module", autouse=True)
def layout() -> Iterator[groups.Layout]:
    """This process alone, on the CPU."""
    yield groups.start("cpu")
    groups.stop()


@pytest.fixture
def parameters() -> dict[str, nn.Parameter]:
    """Four parameters with gradients."""
    return four_parameters()


def test_biases_and_norms_are_not_decayed() -> None:
    """As upstream: by the end of the name; a LoRA factor is decayed."""
    names = {
        "layers.0.attention.wq.weight": True, "layers.0.attention.wq.lora_a.weight": True,
        "layers.0.attention.wq.bias": False, "layers.0.attention_norm.weight": False, "norm.weight": False,
        "output.weight": True,
    }  # fmt: skip
    made = {name: nn.Parameter(torch.ones(2)) for name in names}
    optimizer = build_optimizer("adamw", made, 0.1, 0.02)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in made.items()} == {k: 0.02 if v else 0.0 for k, v in names.items()}
    assert all(group["betas"] == BETAS == (0.9, 0.95) and group["lr"] == 0.1 for group in optimizer.param_groups)
    for kind in OPTIMIZERS:
        slower = build_optimizer(kind, made, 0.1, 0.02, beta2=0.999)
        assert all(group["betas"] == (0.9, 0.999) for group in slower.param_groups)
    assert len(build_optimizer("adamw", {"a.bias": nn.Parameter(torch.ones(2))}, 0.1, 0.1).param_groups) == 1


def test_a_step_is_adamws() -> None:
    """One step written out (Loshchilov & Hutter): decay, then the sign of the gradient times the rate."""
    decayed, spared = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer("adamw", {"a.weight": decayed, "a.bias": spared}, 0.1, 0.5)
    decayed.grad, spared.grad = torch.tensor([3.0]), torch.tensor([-3.0])
    optimizer.step()
    assert decayed.item() == pytest.approx(2 * (1 - 0.1 * 0.5) - 0.1, rel=1e-6)
    assert spared.item() == pytest.approx(2 + 0.1, rel=1e-6)


SHAPES = {"tok_embeddings.weight": (40, 128), "pos_embeddings.weight": (64, 64),
          "a.lora_a.weight": (50, 100), "b.weight": (4096,), "norm.weight": (5000,),
          "c.bias": (70, 3), "output.weight": (33, 321)}  # fmt: skip
"""From 4096 values on in 8 bits, but for embeddings; some with a last block that is short."""


def reference_adamw(parameters: dict[str, nn.Parameter], bits: int) -> torch.optim.Optimizer:
    """bitsandbytes' own, in the same groups."""
    spared = {name for name in parameters if name.endswith((".bias", "norm.weight"))}
    groups = [
        {"params": [p for name, p in parameters.items() if (name in spared) == wanted], "weight_decay": decay}
        for wanted, decay in ((False, 0.1), (True, 0.0))
    ]
    kind = bitsandbytes.optim.AdamW8bit if bits == 8 else bitsandbytes.optim.AdamW32bit
    return kind([group for group in groups if group["params"]], lr=0.01, betas=BETAS)


def test_8_bit_adamw_is_bitsandbytes() -> None:
    """Bit for bit over some steps: weights, codes and scales; embeddings as its 32-bit one."""
    torch.manual_seed(0)
    ours = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    theirs = {name: nn.Parameter(p.detach().clone()) for name, p in ours.items()}
    embedding = {name: p for name, p in theirs.items() if "_embeddings" in name}
    others = {name: p for name, p in theirs.items() if name not in embedding}
    optimizer = build_optimizer("adamw8bit", ours, 0.01, 0.1)
    references = [reference_adamw(others, 8), reference_adamw(embedding, 32)]
    for _ in range(4):
        for name, parameter in ours.items():
            parameter.grad = torch.randn_like(parameter)
            theirs[name].grad = parameter.grad.clone()
        for one in (optimizer, *references):
            one.step()
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name
        state, known = optimizer.state[parameter], references[name in embedding].state[theirs[name]]
        assert torch.equal(state["exp_avg"], known["state1"]) and torch.equal(state["exp_avg_sq"], known["state2"])
        wide = name in embedding or name == "c.bias"
        assert state["exp_avg"].dtype == (torch.float32 if wide else torch.uint8)
        if not wide:
            assert torch.equal(state["exp_avg_scales"], known["absmax1"])
            assert torch.equal(state["exp_avg_sq_scales"], known["absmax2"])
        assert state["step"] == 4


def test_moments_in_fp32_become_8_bits() -> None:
    """As a state restored on another layout does at its next step: first moments have signs, second ones none."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(64, 100))
    optimizer = build_optimizer("adamw8bit", {"a.weight": parameter}, 0.01, 0.1)
    first, second, parameter.grad = torch.randn(64, 100), torch.rand(64, 100), torch.randn(64, 100)
    optimizer.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": first, "exp_avg_sq": second}
    optimizer.step()
    state = optimizer.state[parameter]
    for moment, signed, wanted in (
        ("exp_avg", True, 0.9 * first + 0.1 * parameter.grad),
        ("exp_avg_sq", False, 0.95 * second + 0.05 * parameter.grad.square()),
    ):
        assert state[moment].dtype == torch.uint8
        found = unpack_moment(state[moment], state[f"{moment}_scales"], signed)
        assert (found - wanted).abs().max() < 0.03 * wanted.abs().max()  # packed twice
    assert state["step"] == 4


def test_8_bits_take_a_quarter_of_the_memory() -> None:
    """Of the fp32 moments, and a 64th for the scales."""
    sizes = []
    for kind in ("adamw", "adamw8bit"):
        parameter = nn.Parameter(torch.zeros(64, 256))
        optimizer = build_optimizer(kind, {"a.weight": parameter}, 0.01, 0.1)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        sizes.append(sum(t.nbytes for key, t in optimizer.state[parameter].items() if key != "step"))
    assert sizes == [2 * 4 * 64 * 256, 2 * (64 * 256 + 4 * 64)]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_memory_of_the_moments_is_known_before(kind: str) -> None:
    """Of embeddings and small parameters as of those in 8 bits, whose last block may be short."""
    assert OPTIMIZERS == ("adamw", "adamw8bit", "paged_adamw")
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    optimizer = build_optimizer(kind, parameters, 0.01, 0.1)
    for name, parameter in parameters.items():
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        kept = sum(t.nbytes for key, t in optimizer.state[parameter].items() if key != "step")
        assert state_bytes(kind, {name: parameter}) == kept, name
    assert state_bytes(kind, parameters) == sum(state_bytes(kind, {n: p}) for n, p in parameters.items())


def test_optimizers_by_name(parameters: dict[str, nn.Parameter]) -> None:
    """On the CPU there is nothing to page: PyTorch's own. A parameter without a gradient is left alone."""
    for kind in ("adamw", "paged_adamw"):
        assert type(build_optimizer(kind, parameters, 0.1, 0.1)) is torch.optim.AdamW
    optimizer = build_optimizer("adamw8bit", parameters, 0.1, 0.1)
    parameters["d"].grad = None
    before = parameters["d"].detach().clone()
    optimizer.step()
    assert torch.equal(parameters["d"], before) and parameters["d"] not in optimizer.state
    assert len(optimizer.state) == 3
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters.values())


def test_gradient_norm_over_two_ranks(torchrun, tmp_path: Path) -> None:
    """Cut over tensor-parallel and over data-parallel ranks, every value counts once, and both know the same norm.

    The worker also steps on shards in 8 bits.
    """
    worker = Path(__file__).with_name("optim_worker.py")
    done = torchrun(2, worker, tmp_path, PYTHONPATH=str(worker.parents[1]))
    assert done.returncode == 0, done.stderr[-3000:]
    norms = [[float(number) for number in (tmp_path / f"norms.{rank}").read_text().split()] for rank in range(2)]
    assert norms[0] == norms[1]
    assert norms[0] == [pytest.approx(norms[0][0], rel=1e-6)] * 3


class Sgd(torch.optim.SGD):
    """Shows the gradients that a step was given; keeps them."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


@pytest.mark.parametrize("clip", [0.5, 1e6, 0.0, -1.0])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_clipping_is_pytorchs(parameters: dict[str, nn.Parameter], clip: float, scale: float) -> None:
    """The engine's update against `clip_grad_norm_`, under a loss scale as without."""
    reference = [nn.Parameter(p.detach().clone()) for p in parameters.values()]
    for theirs, ours in zip(reference, parameters.values(), strict=True):
        theirs.grad = ours.grad.clone()
        ours.grad.mul_(scale)
    if clip > 0:
        nn.utils.clip_grad_norm_(reference, clip)
    schedule = Schedule(1, 1, 0.0, 0.1, 0.1, clip, 1, 1)
    engine = Engine(
        model=None, parameters=NamedParameters(parameters, SLICINGS), optimizer=Sgd(parameters.values(), lr=0.0),
        order=None, schedule=schedule, settings=StepSettings(), reporter=None, saver=None, signals=StopSignals(),
    )  # fmt: skip
    engine._update(engine.parameters.gradient_norm().item() / scale, lr=0.1, scale=scale)
    for theirs, ours in zip(reference, parameters.values(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert engine.optimizer.param_groups[0]["lr"] == 0.1
