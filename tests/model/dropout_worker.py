"""Run under torchrun on two ranks: what LoRA's dropout drops on each; every rank asserts, and says OK at the end."""

import sys
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from accessory.model.low_rank import LoraFactor, LowRank
from accessory.parallel import groups
from accessory.parallel.tensor import WHOLE, gather_slices


def dropped(slices_input: bool) -> list[torch.Tensor]:
    """What is left of ones [50, 6], on each rank."""
    low_rank = LowRank(LoraFactor((6, 6), WHOLE), LoraFactor((6, 6), WHOLE), 1.0, 0.5, slices_input)
    return list(gather_slices(low_rank.draw().kept(torch.ones(50, 6)), 0).chunk(2))


layout = groups.start("cpu", model_parallel_size=2)
torch.manual_seed(7)  # ranks of a model-parallel group start alike
one, other = dropped(slices_input=False)
assert torch.equal(one, other)
one, other = dropped(slices_input=True)
assert not torch.equal(one, other)
again, other = dropped(slices_input=False)  # and stay alike
assert torch.equal(again, other)
assert not torch.equal(again, one)
print(f"OK {layout.rank}", flush=True)
groups.stop()
