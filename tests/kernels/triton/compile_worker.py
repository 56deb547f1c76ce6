"""Run alone, without the interpreter: compiles every kernel for an H100 or H200, which needs no GPU, to machine code.

Prints a JSON object: for each kernel, how many loads and stores of 16 bytes it has, bytes of registers spilled, and
bytes of shared memory.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from accessory.kernels.triton import (
    cross_entropy,
    decoding_attention,
    decoding_groups,
    decoding_products,
    four_bit,
    gate,
    group_codes,
    rms_norm,
    rotary,
)

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FP32 = ("weight", "scale", "sums", "rotations", "highest", "mass", "target", "nested_scales", "offset")
TYPES = {
    **dict.fromkeys(("x", "y", "dy", "dx", "up", "dup", "out", "scores"), "*bf16"),
    **dict.fromkeys((*FP32, "codebook", "nested_codebook"), "*fp32"),
    **{"codes": "*i32", "local": "*i64", "eps": "fp32", "scales": "*u8"},
}
"""Of arguments by name; the others are sizes."""


def compiled(kernel: triton.JITFunction, constants: dict, warps: int, **options) -> dict[str, int]:
    """What became of `kernel` where addresses, sizes and strides are multiples of 16, as a model's are."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] in "*i"}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, **options})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        told = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    wide = {kind: len(re.findall(rf"{kind}\.global\.v4\.b32", made.asm["ptx"])) for kind in ("ld", "st")}
    return {**wide, "spilled": int(re.search(r"STACK:(\d+)", told.stdout)[1]), "shared": made.metadata.shared}


found = {}
for width in (128, 8192):
    tile = rms_norm._tile(width)
    warps = tile.pop("num_warps")
    for known in (False, True):
        found[f"rms_norm {width} {known}"] = compiled(rms_norm._forward, {"KNOWN": known, **tile}, warps)
    for dweight in (False, True):
        constants = {"DX": True, "DWEIGHT": dweight, **tile}
        found[f"rms_norm gradient {width} {dweight}"] = compiled(rms_norm._backward, constants, warps)
for nested in (False, True):
    TYPES["scales"] = "*u8" if nested else "*fp32"
    constants = {"NESTED": nested, "PER_UNIT": 8, "BLOCK": 64, "NESTED_BLOCK": 256, "BLOCKS": four_bit.BLOCKS}
    found[f"four_bit {nested}"] = compiled(four_bit._dequantize, constants, 4, enable_fp_fusion=False)
TYPES |= {"scales": "*fp16", "high": "*u8"}
for bits, points in product((2, 3, 4), (False, True)):
    TYPES |= {"codes": "*i32" if bits == 4 else "*i16", "zeros": "*u8" if points else "*fp16"}
    constants = {"BITS": bits, "GROUP": 64, "POINTS": points, "PER_UNIT": group_codes.COLUMNS}
    constants |= {"ROWS": 1, "UNITS": group_codes.UNITS}
    found[f"group_codes {bits} {points}"] = compiled(group_codes._dequantize, constants, 4, enable_fp_fusion=False)
for neighbours, rest in ((True, 0), (False, 0), (True, 64), (False, 64)):
    constants = {"NEIGHBOURS": neighbours, "INVERSE": rest > 0, "HEADS": 32, "PAIRS": 64, "REST": rest}
    found[f"rotary {neighbours} {rest}"] = compiled(rotary._rotate, constants, 4)
for activation in gate.ACTIVATIONS:
    constants = {"ACTIVATION": activation, "BLOCK": gate.BLOCK}
    found[f"gate {activation}"] = compiled(gate._forward, constants, 4)
    found[f"gate gradient {activation}"] = compiled(gate._backward, constants, 4)
for kernel in (cross_entropy._statistics, cross_entropy._gradient):
    found[f"cross_entropy {kernel.fn.__name__}"] = compiled(kernel, {"BLOCK": cross_entropy.BLOCK}, 8)
TYPES |= dict.fromkeys(("residual", "b", "following", "projected", "keys", "values"), "*bf16")
TYPES |= dict.fromkeys(("norm", "bias", "lows", "corrections", "slopes", "partials", "statistics"), "*fp32")
TYPES |= {"positions": "*i64", "finished": "*i32", "eps": "fp32", "scale": "fp32"}
for number in ("", "_1", "_2"):
    parts = {"codes": "*i32", "scales": "*u8", "nested_scales": "*fp32", "offset": "*fp32"}
    TYPES |= {f"{part}{number}": kind for part, kind in parts.items()}
plain = {"NORM": 0, "RESIDUAL": False, "BIAS": False, "AHEAD": 0, "ACTIVATION": "", "RANK": 16}
links = {
    "entrance": {"MATRICES": 3, "NORM": 1, "BIAS": True},
    "layer norm": {"MATRICES": 3, "NORM": 2, "BIAS": True},
    "out": {"MATRICES": 1, "RESIDUAL": True, "AHEAD": 32},
    "gated": {"MATRICES": 2, "NORM": 1, "AHEAD": 16, "ACTIVATION": "silu"},
}
for (name, link), rows in product(links.items(), decoding_products.COLUMNS):
    block, warps = decoding_products.MANY if "AHEAD" in link else decoding_products.FEW
    constants = {"NESTED": True, "NESTED_BLOCK": 256, "COLUMNS": decoding_products.COLUMNS[rows], "BLOCK": block}
    constants |= {**plain, **link, "ROWS": rows}
    for packed in (True, False):
        TYPES |= dict.fromkeys(("codes", "codes_1", "codes_2"), "*i32" if packed else "*bf16")
        constants["PLAIN"] = not packed
        kind = "" if packed else " plain"
        found[f"decoding {name} {rows}{kind}"] = compiled(decoding_products._multiply, constants, warps)
TYPES |= dict.fromkeys(("q_norm", "k_norm"), "*fp32")
for group, splits, width, dtype in (
    (1, 8, 128, torch.bfloat16), (4, 1, 128, torch.bfloat16), (4, 1, 256, torch.bfloat16), (4, 1, 256, torch.float32)
):  # fmt: skip
    constants = {"KV_HEADS": 8, "GROUP": group, "PADDED": 1 if group == 1 else 16, "WIDTH": width, "HALF": width // 2}
    constants |= {"NEIGHBOURS": True, "SPLITS": splits, "SPLITS_PADDED": splits, "AHEAD": 16, "NORM": group > 1}
    constants["TOKENS"] = decoding_attention.tokens_together(width, dtype)
    constants |= {"SLOPES": width == 256, "BEYOND": 8 if width == 256 else 0}
    read = "*fp32" if dtype == torch.float32 else "*bf16"
    TYPES |= dict.fromkeys(("projected", "keys", "values", "out", "following", "beyond"), read)
    found[f"decoding attention {group} {splits} {width} {read}"] = compiled(decoding_attention._attend, constants, 4)
TYPES["following"] = TYPES["out"] = "*bf16"
TYPES |= {"scales": "*fp16", "zeros": "*fp16", "b": "*bf16"}
for bits, rows in product((2, 3, 4), decoding_groups.UNITS):
    TYPES["codes"] = "*i32" if bits == 4 else "*i16"
    constants = {"BITS": bits, "GROUP": 64, "POINTS": False, "BIAS": True, "RANK": 16, "ROWS": rows}
    constants |= {"BLOCK": decoding_groups.BLOCK, "UNITS": decoding_groups.UNITS[rows]}
    found[f"decoding groups {bits} {rows}"] = compiled(decoding_groups._multiply, constants, decoding_groups.WARPS)
print(json.dumps(found))
