"""What a step does on a GPU only: numbers that are read later, steps that the device skips, paged moments, a second
stream for unpacking, aligned logits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import Tensor

from accessory.checkpoint.save import STATE_STEM
from accessory.checkpoint.training_state import Progress, Resumption, collect_training_state, restore_training_state
from accessory.data.batch import PackedBatch
from accessory.engine import Engine
from accessory.model.loss import cross_entropy_sum
from accessory.quant.ahead import Ahead, CudaLanes, Lanes, unpacking_ahead
from accessory.run.determinism import algorithms_as_before, fix_order_of_sums
from accessory.run.report import StepReport
from accessory.run.unpacking import chosen_ahead
from tools.gpu_checks.check import Findings, Ground, check
from tools.gpu_checks.families import training
from tools.gpu_checks.rates import seconds_of
from tools.model_sizes import SIZES

STEPS = 4
PAGED = {"dim": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 512, "vocab_size": 1024}
"""A shape with matrices of 100,000 numbers and more, whose moments are paged."""
ODD_COSTS = 1.15
"""How many times as long a head of odd rows may take as one of aligned rows."""


@check(4, needs_cuda=True)
def numbers_read_later(ground: Ground, found: Findings) -> None:
    """`Engine.train` reads a step's numbers behind the next one's gradients: its steps are those of `Engine.step`."""
    losses, weights = [], []
    with _equal_bits(ground):
        for later in (False, True):
            engine, reports = _engine(ground)
            if later:
                _read_later(engine, ground, found)
                engine.train(Progress())
            else:
                progress = Progress()
                reports += [engine.step(progress)[0] for _ in range(STEPS)]
            losses.append([report.loss for report in reports])
            weights.append(_weights(engine))
    found.expect(losses[0] == losses[1] and len(losses[0]) == STEPS, f"losses are {losses[1]}, not {losses[0]}")
    found.close("weights", weights[1], weights[0], 0)


@check(3, needs_cuda=True)
def skipped_by_the_device(ground: Ground, found: Findings) -> None:
    """A step whose loss is no number, which the host learns one step later, leaves weights and moments as they were."""
    engine, reports = _engine(ground)
    _read_later(engine, ground, found)
    engine.settings = replace(engine.settings, skip_not_finite=True)
    forward, states = engine._forward, []

    def poisoned(batch: PackedBatch, counts: Tensor) -> Tensor:
        """The second step's loss is no number."""
        return forward(batch, counts) * (math.nan if len(states) == 1 else 1.0)

    def note(*_: object) -> None:
        """What the optimizer has made."""
        of = engine.optimizer.state
        kept = [(p, of[p]["exp_avg"], of[p]["exp_avg_sq"]) for p in engine.parameters.values()]
        states.append(torch.cat([t.detach().flatten() for each in kept for t in each]))

    engine._forward = poisoned
    engine.optimizer.register_step_post_hook(note)
    engine.train(Progress())
    found.expect(len(states) == STEPS, f"the optimizer was called {len(states)} times")
    found.close("after the skipped step", states[1], states[0], 0)
    found.expect(not torch.equal(states[2], states[1]), "the step after it changes nothing")
    finite = [math.isfinite(report.loss) for report in reports]
    found.expect(finite == [True, False, True, True], f"losses are {[report.loss for report in reports]}")


@check(4, needs_cuda=True)
def paged_moments(ground: Ground, found: Findings) -> None:
    """`--optim paged_adamw`: its moments are in managed memory, are saved, and go on from there to the same weights."""
    with TemporaryDirectory() as folder, _equal_bits(ground):
        file = Path(folder, "shape.json")
        file.write_text(json.dumps(PAGED))
        how = {"model": str(file), "method": "full", "quant_type": None, "optim": "paged_adamw"}
        engine, _ = _engine(ground, **how)
        progress = Progress()
        for _ in range(2):
            engine.step(progress)
        moments = [engine.optimizer.state[p]["exp_avg"] for p in engine.parameters.values()]
        paged = sum(getattr(moment, "is_paged", False) for moment in moments)
        found.figures["paged"] = f"{paged} of {len(moments)}"
        found.expect(paged or not ground.cuda, "no moment is in managed memory")
        saved = collect_training_state(engine.optimizer, engine.parameters)
        save_file({name: part.contiguous() for name, part in saved.items()}, Path(folder, f"{STATE_STEM}.safetensors"))
        weights = {name: p.detach().clone() for name, p in engine.parameters.items()}
        other, _ = _engine(ground, **how)
        for name, value in weights.items():
            other.parameters[name].data.copy_(value)
        restored = Resumption(Path(folder), progress, 1, 1, (), ())
        restore_training_state(restored, other.optimizer, other.parameters, ground.layout)
        ends = []
        for one, at in ((engine, progress), (other, replace(progress))):
            losses = [one.step(at)[0].loss for _ in range(2)]
            ends.append((losses, _weights(one)))
    found.expect(ends[0][0] == ends[1][0], f"losses after it are {ends[1][0]}, not {ends[0][0]}")
    found.close("weights", ends[1][1], ends[0][1], 0)


@check(8, needs_cuda=True)
def unpacked_ahead(ground: Ground, found: Findings) -> None:
    """The next matrix of 7B unpacked beside the product before it: the same bits, and what a run would choose."""
    length, ends = ground.pick(2048, 32), []
    lanes = CudaLanes(ground.device) if ground.cuda else _no_lanes()
    with TemporaryDirectory() as folder, _equal_bits(ground):
        file = Path(folder, "shape.json")
        file.write_text(json.dumps(SIZES[ground.pick("7B", "tiny")] | {"n_layers": 2, "vocab_size": 32000}))
        for ahead in (None, Ahead(lanes)):
            engine, _ = _engine(ground, model=str(file), batch_size=1, seq=(length,), max_words=length)
            progress = Progress()
            with unpacking_ahead(ahead):
                ends.append(([engine.step(progress)[0].loss for _ in range(STEPS)], _weights(engine)))
        found.figures["hits"], found.figures["misses"] = ahead.hits, ahead.misses
        found.expect(ahead.hits or not ground.cuda, "no matrix was unpacked ahead")
        found.figures["chosen"] = chosen_ahead(engine.model.llma, length)[1]
    found.expect(ends[0][0] == ends[1][0], f"losses are {ends[1][0]}, not {ends[0][0]}")
    found.close("weights", ends[1][1], ends[0][1], 0)


@check(3, needs_cuda=True)
def odd_vocabulary(ground: Ground, found: Findings) -> None:
    """The loss over a head of 50,257 rows takes no longer than over one of 50,304: its logits begin aligned."""
    tokens, width = ground.pick((4096, 2048), (8, 16))
    taken = {}
    for rows in ground.pick((50257, 50304), (257, 320)):
        hidden, head = (torch.randn(n, width, dtype=torch.bfloat16, device=ground.device) for n in (tokens, rows))
        labels = torch.arange(tokens, device=ground.device)
        hidden.requires_grad_()

        def step(hidden: Tensor = hidden, head: Tensor = head, labels: Tensor = labels) -> None:
            """The loss and its gradient."""
            torch.autograd.grad(cross_entropy_sum(hidden, head, labels), hidden)

        taken[rows] = seconds_of(step, ground)
        found.figures[f"{rows}_us"] = round(1e6 * taken[rows], 1)
    odd, aligned = taken.values()
    found.figures["odd_by_aligned"] = round(odd / aligned, 3)
    found.expect(ground.tiny or odd <= ODD_COSTS * aligned, f"odd rows take {odd / aligned:.2f} times as long")


def _engine(ground: Ground, **changes: object) -> tuple[Engine, list[StepReport]]:
    """One that does not clip, and the reports that it makes."""
    engine, reports = training(**{"steps": STEPS} | changes).engine(ground.layout), []
    engine.settings = replace(engine.settings, pin_memory=ground.cuda)
    engine.schedule = replace(engine.schedule, clip_grad=-1.0)
    engine.reporter.step = reports.append
    engine.model.train()
    return engine, reports


def _read_later(engine: Engine, ground: Ground, found: Findings) -> None:
    """The engine shall do so; in a rehearsal it is made to."""
    if not ground.cuda:
        vars(engine)["reads_later"] = True
    found.expect(engine.reads_later, "a step's numbers are read at once")


@contextmanager
def _equal_bits(ground: Ground) -> Iterator[None]:
    """Inside this context equal work gives equal bits."""
    with algorithms_as_before():
        fix_order_of_sums(True, ground.device)
        yield


def _weights(engine: Engine) -> Tensor:
    """All that is trained."""
    return torch.cat([p.detach().flatten() for p in engine.parameters.values()])


def _no_lanes() -> Lanes:
    """Of a CPU, on which everything is done in order."""
    nothing = lambda *_: None  # noqa: E731
    return SimpleNamespace(
        mark=nothing, beside=lambda _: nullcontext(), mark_beside=nothing, wait=nothing, used_beside=nothing
    )


CHECKS = [numbers_read_later, skipped_by_the_device, paged_moments, unpacked_ahead, odd_vocabulary]
