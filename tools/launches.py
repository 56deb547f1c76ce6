"""What does a step, or a token of an answer, ask a GPU for?  Kernel launches, bytes and waits, counted without a GPU.

python tools/launches.py block                        one block of LLaMA-2 7B, by method, as docs/speed.md shows it
python tools/launches.py steps --triton False         a step of a tiny model, by family and method
python tools/launches.py operations --method lora     each operation of such a block
python tools/launches.py token                        a token of an answer of LLaMA-2 7B
python tools/launches.py families                     a block of such a token, by family
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.benchmarking.pretended_gpu import load

load()

from accessory.entry import from_command_line, run_tool
from accessory.model.args import ModelArgs
from accessory.model.decoding_chain import why_not
from accessory.parallel import groups
from tools.benchmarking.counted_steps import CONFIGS, counted_step, extra, tiny_args
from tools.benchmarking.counted_token import counted_token, pretended_answering
from tools.benchmarking.counted_token import token as token_of
from tools.benchmarking.launches import Counts
from tools.benchmarking.pretended_gpu import pretended
from tools.gpu_checks.families import SHAPES, SIZE
from tools.model_sizes import args_of

BLOCKS = (("lora", "nf4"), ("normbias", "nf4"), ("qst", "nf4"), ("lora", "none"), ("full", "none"))
TOKENS = (("lora", "nf4", 1), ("lora", "nf4", 8), ("normbias", "nf4", 1), ("qst", "nf4", 1), ("lora", "none", 1),
          ("lora", "int4_g64", 1))  # fmt: skip
"""(method, how the base is packed, documents)."""
STEPS = {
    "full": ("full", None), "LoRA nf4": ("lora", "nf4"), "LoRA bf16": ("lora", None),
    "NormBias nf4": ("normbias", "nf4"), "NormBias bf16": ("normbias", None), "QST nf4": ("qst", "nf4"),
    "QST bf16": ("qst", None), "QSFT int4": ("qsft", "int4_g64"),
}  # fmt: skip
"""Column of the table of steps -> (method, how the base is packed)."""


def block(model: str = "7B", seq: int = 4096) -> None:
    """What one more block asks for in a step's forward and backward: the difference of two depths.

    Args:
        model: a size, or a file with a model's settings.
        seq: tokens of the step, in one document.
    """
    print("| block | Triton | forward | backward |\n|---|---|---|---|")
    for method, quant_type in BLOCKS:
        for triton in (True, False):
            found = _extra(model, method, quant_type, seq, triton)
            cells = [_large(_sum(found, phase)) for phase in ("forward", "backward")]
            storage = "bf16" if quant_type == "none" else quant_type
            print(f"| {method}, {storage} | {'yes' if triton else 'no'} | {' | '.join(cells)} |")


def operations(
    model: str = "7B", method: str = "lora", quant_type: str = "nf4", seq: int = 4096, triton: bool = True
) -> None:
    """Each operation of such a block, most bytes first.

    Args:
        model: a size, or a file with a model's settings.
        method: what is trained.
        quant_type: how the base is packed; none: it is not.
        seq: tokens of the step, in one document.
        triton: whether Triton's kernels work.
    """
    found = _extra(model, method, quant_type, seq, triton)
    print("| phase | operation | launches | GB |\n|---|---|---|---|")
    for (phase, operation), counts in sorted(found.items(), key=lambda item: (item[0][0] != "forward", -item[1].bytes)):
        if counts != Counts():
            print(f"| {phase} | {operation} | {counts.launches} | {counts.bytes / 1e9:.3f} |")


def steps(triton: bool = True) -> None:
    """Launches and waits of a whole step of tiny models with one block.

    Args:
        triton: whether Triton's kernels work.
    """
    print(f"| family | {' | '.join(STEPS)} |\n|{'---|' * (len(STEPS) + 1)}")
    for family in CONFIGS:
        cells = []
        for method, quant_type in STEPS.values():
            total = counted_step(tiny_args(family), method, quant_type, triton=triton).total()
            cells.append(f"{total.launches}, {total.syncs}")
        print(f"| {family} | {' | '.join(cells)} |")


def token(model: str = "7B", context: int = 1024) -> None:
    """What a token of an answer asks for where nothing is recorded; the likeliest is taken.

    Args:
        model: a size, or a file with a model's settings.
        context: tokens of the cache that are looked at.
    """
    args = args_of(model)
    print("| base and method | documents | with Triton | without |\n|---|---|---|---|")
    for method, quant_type, documents in TOKENS:
        packed = None if quant_type == "none" else quant_type
        how = {"documents": documents, "context": context}
        cells = [_large(token_of(args, method, packed, triton=triton, **how)) for triton in (True, False)]
        print(f"| {method}, {quant_type.replace('none', 'bf16')} | {documents} | {' | '.join(cells)} |")


def families() -> None:
    """What one more block asks for in a token of an answer, for a small model of each family with LoRA on NF4.

    Beside it stands what its blocks have that cannot be computed in five launches.
    """
    print("| family | launches of a block | computed by modules, for its |\n|---|---|---|")
    for family, shape in SHAPES.items():
        made = [ModelArgs(**SIZE | shape | {"n_layers": depth}) for depth in (1, 2)]
        one, two = (counted_token(args, "lora", "nf4", triton=True).total() for args in made)
        with pretended(triton=True):
            reason = why_not(pretended_answering(made[0], "lora", "nf4", 1, 64).decoder)
        print(f"| {family} | {(two - one).launches} | {reason} |")


def _extra(model: str, method: str, quant_type: str, seq: int, triton: bool) -> dict[tuple[str, str], Counts]:
    packed = None if quant_type == "none" else quant_type
    return extra(args_of(model), method, packed, triton=triton, documents=1, seq=seq)


def _sum(found: dict[tuple[str, str], Counts], phase: str) -> Counts:
    return sum((counts for (when, _), counts in found.items() if when == phase), Counts())


def _large(counts: Counts) -> str:
    return f"{counts.launches}, {counts.bytes / 1e9:.2f} GB"


def _command() -> None:
    groups.start("cpu")
    commands = {"block": block, "steps": steps, "operations": operations, "token": token, "families": families}
    command = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in commands else "block"
    from_command_line(commands[command])()


if __name__ == "__main__":
    run_tool(_command)
