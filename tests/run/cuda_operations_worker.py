"""Run alone: prints, as JSON, which of PyTorch's operations a training step needs on a GPU, by family and method."""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools.launches import CONFIGS, STEPS, counted_step, groups, tiny_args  # which pretends that there is a GPU

groups.start("cpu")
found = {}
for family in CONFIGS:
    methods = STEPS.values() if family == "llama" else [STEPS["full"], STEPS["LoRA nf4"]]
    for method, quant_type in methods:
        counter = counted_step(tiny_args(family), method, quant_type, triton=False)
        found[f"{family} {method} {quant_type}"] = sorted({operation for _, operation in counter.found})
print(json.dumps(found))
