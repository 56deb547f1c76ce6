"""Run under torchrun on two ranks: what LoRA's dropout drops on each; every rank asserts, and says OK at the end."""

import sys
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from accessory.model.linear import Linear
from accessory.parallel import groups
from accessory.parallel.tensor import gather_slices


def dropped(cut: str) -> list[torch.Tensor]:
    """What is left of ones [50, 6], on each rank."""
    linear = Linear(6, 6, cut=cut, ranks=2, bias=False, dtype=torch.float32)
    linear.add_lora(2, 1.0, 0.5)
    return list(gather_slices(linear.addition(None).dropout_mask(torch.ones(50, 6)), 0).chunk(2))


layout = groups.start("cpu", model_parallel_size=2)
torch.manual_seed(7)  # ranks of a model-parallel group start alike
one, other = dropped("column")
assert torch.equal(one, other)
one, other = dropped("row")
assert not torch.equal(one, other)
again, other = dropped("column")  # and stay alike
assert torch.equal(again, other)
assert not torch.equal(again, one)
print(f"OK {layout.rank}", flush=True)
groups.end_process()
