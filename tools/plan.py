"""Will it fit?  python tools/plan.py 7B --method normbias --quant --seq 512      python tools/plan.py table --seq 512

Bytes per rank from the model's shapes alone, by the code that --dry_run prints.
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import fire
import torch

from accessory.entry import run_tool
from accessory.errors import ConfigError, nearest
from accessory.method.peft import Peft
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.parallel.groups import Layout
from accessory.plan import MemoryPlan, memory_plan, parameter_counts
from accessory.quant import storage

SIZES = {
    "7B": {"dim": 4096, "n_layers": 32, "n_heads": 32},
    "13B": {"dim": 5120, "n_layers": 40, "n_heads": 40},
    "70B": {
        "dim": 8192,
        "n_layers": 80,
        "n_heads": 64,
        "n_kv_heads": 8,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
    },
}
"""LLaMA-2, vocabulary 32,000."""
METHODS = {"normbias": {}, "normbiaslora": {"lora_rank": 16}}


def plan(
    model: str,
    method: str = "normbias",
    quant: bool = True,
    seq: int = 512,
    batch_size: int = 1,
    checkpointing: bool = True,
    model_parallel_size: int = 1,
    data_parallel_size: int = 1,
    data_parallel: str = "sdp",
) -> None:
    """Print the memory plan of MODEL (7B, 13B, 70B, or a params.json) in training, per rank."""
    made, trained, total = _plan(
        str(model),
        method,
        quant,
        seq * batch_size,
        checkpointing,
        model_parallel_size,
        data_parallel_size,
        data_parallel,
    )
    print(f"trainable parameters: {trained:,} of {total:,}")
    print(made.table(f"{model} {method}, {batch_size} x {seq} tokens", None))


def table(seq: int = 512) -> None:
    """Print the Markdown table of README: LLaMA-2 in NF4 at one document of SEQ tokens."""
    print("| model | method | trainable parameters | weights | trainable | gradients | optimizer | activations | "
          "logits | buffers | total |\n|---|---|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for size in SIZES:
        for method in METHODS:
            for checkpointing in (True, False):
                made, trained, _ = _plan(size, method, True, seq, checkpointing, 1, 1, "sdp")
                names = ("weights", "trainable", "gradients", "optimizer", "activations", "logits", "buffers", "total")
                cells = [f"{getattr(made, name) / 1e9:.3f}" for name in names]
                label = f"{method}, `--checkpointing`" if checkpointing else method
                print(f"| {size} | {label} | {trained:,} | {' | '.join(cells)} |")


def _plan(
    model: str,
    method: str,
    quant: bool,
    tokens: int,
    checkpointing: bool,
    ranks: int,
    replicas: int,
    data_parallel: str,
) -> tuple[MemoryPlan, int, int]:
    if method not in METHODS:
        raise ConfigError(f"--method {method!r} is unknown.{nearest(method, METHODS)} Known: {', '.join(METHODS)}.")
    args = _args(model)
    args.check_model_parallel(ranks)
    decoder = Decoder(args, dtype=torch.bfloat16, ranks=ranks, storage=storage("nf4") if quant else None)
    attachment = Peft(Peft.Settings(**METHODS[method])).attach(decoder)
    layout = Layout(mp_size=ranks, dp_size=replicas)
    recomputed = len(decoder.layers) if checkpointing else 0
    made = memory_plan(
        decoder, attachment, layout, tokens=tokens, checkpointing=recomputed, data_parallel=data_parallel
    )
    return made, *parameter_counts(decoder, attachment)


def _args(model: str) -> ModelArgs:
    if model in SIZES:
        return ModelArgs(vocab_size=32000, **SIZES[model])
    if not Path(model).is_file():
        raise ConfigError(f"{model!r} is neither one of {', '.join(SIZES)} nor a params.json.")
    settings = json.loads(Path(model).read_text())
    return ModelArgs(**{"vocab_size": 32000} | {k: v for k, v in settings.items() if v != -1})


if __name__ == "__main__":
    run_tool(lambda: fire.Fire({"plan": plan, "table": table} if sys.argv[1:2] in (["table"], ["plan"]) else plan))
