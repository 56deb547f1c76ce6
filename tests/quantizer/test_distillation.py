"""accessory/quantizer/distillation.py: its loss against float64; a packed model comes nearer to the full one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accessory.export import open_base
from accessory.parallel import groups
from accessory.quant.groups import group_storage
from accessory.quantizer.blocks import Blocks, linears
from accessory.quantizer.distillation import distill, divergence, last_states, packed_decoder
from accessory.quantizer.states import States


def test_divergence() -> None:
    """Value and gradient of sum KL(teacher || model), over more tokens than a chunk; padding rows take no part."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(50, 16, generator=generator)
    hidden, teacher = torch.randn(2, 300, 16, generator=generator)
    hidden.requires_grad_(True)
    found = divergence(hidden, teacher, head, 45)
    (found / 3).backward()
    wide = hidden.detach().double().requires_grad_(True)
    log_q = (wide @ head[:45].double().t()).log_softmax(1)
    log_p = (teacher.double() @ head[:45].double().t()).log_softmax(1)
    expected = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
    (expected / 3).backward()
    assert torch.allclose(found.double(), expected, rtol=1e-5)
    assert torch.allclose(hidden.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
    assert divergence(teacher, teacher, head, 45).abs() < 1e-3


@pytest.mark.parametrize("also", [(), ("points",)])
def test_comes_nearer_to_the_full_model(tiny_base: Path, tmp_path: Path, also: tuple[str, ...]) -> None:
    """On rows in any order, by scales and zeros alone: a model whose scales are a fifth too large gets them back.

    So it does where zero points are whole, which stay.
    """
    model, _ = open_base([tiny_base])
    full, blocks = (Blocks(model.args, model.tensors, torch.float32, groups.start("cpu")) for _ in range(2))
    ids, kind = torch.arange(8 * 24).view(8, 24) * 37 % 500, group_storage(4, 64, also)
    teacher = States(tmp_path / "states.bin", (8, 24, model.args.dim), torch.float32)
    for index in range(len(full)):
        full.decoder.layers[index] = full.load(index)
    with torch.no_grad():
        teacher.write(iter([last_states(full, ids)]))
    packed = []
    for block in full.decoder.layers:
        packed.append({})
        for name, linear in linears(block).items():
            weight = kind(tuple(linear.weight.shape))
            weight.pack(linear.weight.detach())
            parts = {part: getattr(weight, part).detach() for part in kind.PARTS}
            larger = {part: parts[part] * 1.2 for part in ("scales", "zeros") if part in parts}
            packed[-1][name] = kind, parts | larger
    decoder = packed_decoder(blocks, packed)

    def apart() -> float:
        """The divergence of a token."""
        with torch.no_grad():
            hidden = [decoder.leave(states) for states in (last_states(blocks, ids), teacher.read(range(8)))]
        return float(divergence(*hidden, decoder.head_weight, model.args.vocab_size)) / ids.numel()

    weight = decoder.get_submodule("layers.1.attention.wq.weight")
    before, frozen = apart(), {part: getattr(weight, part).clone() for part in ("codes", *also)}
    steps = [[1, 6, 3, 4], [0, 7, 2, 5]] * 12
    losses = distill(blocks, ids, teacher, steps, 0.02, groups.data_parallel_group(), lambda _: None)
    assert len(losses) == 24 and apart() < 0.5 * before
    assert all(torch.equal(getattr(weight, part), value) for part, value in frozen.items())
