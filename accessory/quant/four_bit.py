"""NF4 and FP4: blocks of 64 weights, a 4-bit code each, one scale a block, and optionally 8-bit scales of scales.

The formats are those of QLoRA (Dettmers et al. 2023, sections 2 and 3), computed by bitsandbytes' functional
operations; the packed tensors are ours, because its modules repack and re-cast weights behind the caller's back.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from math import prod
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from accessory import kernels
from accessory.errors import CheckpointError
from accessory.kernels.bitsandbytes_library import functional as bnb
from accessory.kernels.bitsandbytes_library import plain_scales
from accessory.kernels.codes import BLOCK, NESTED_BLOCK, Codes
from accessory.kernels.few_rows import JoinedMatrices
from accessory.quant.few_rows import FewRowsWeight
from accessory.quant.moments import levels
from accessory.quant.packed import WHOLE, PackedState, PackedWeight, Part, Span, Stored, uncuttable

CPU = torch.device("cpu")
CPU_PIECE = 1 << 18  # weights quantized at a time
_BYTES = {"U8": 1, "uint8": 1}
_FLOATS = {"F32": 1, "float32": 1}
# Bytes, which some files store under a wider type.
_CODES = _BYTES | {"I8": 1, "int8": 1, "BF16": 2, "bfloat16": 2, "F16": 2, "float16": 2, "F32": 4, "float32": 4}
"""Dtypes that a kind of part may have in a file -> how many of the part's numbers one of them holds."""


@lru_cache
def codebook_of(quant_type: str, device: torch.device = CPU) -> Tensor:
    """The 16 values [16] fp32 that a 4-bit code of "nf4" or "fp4" stands for, before scaling."""
    return bnb.get_4bit_type(quant_type, device="cpu").to(device)


class FlatPart(Part):
    """A part with a number for each `block` weights of the flattened matrix; None: one number for all."""

    def shape(self, of: tuple[int, int]) -> tuple[int, ...]:
        """[blocks] of a matrix `of` [N, K]."""
        return (1 if self.block is None else -(-prod(of) // self.block),)


class FourBitWeight(FewRowsWeight):
    """W [N, K] as 4-bit codes, high nibble first, row-major blocks of 64.

    Parts: `codes` uint8 [N*K/2] and `scales`, fp32 [N*K/64] when single-level. Double-quantized (`nested`), `scales` is
    uint8 and decodes as `levels(True, device)[scales] * nested_scales + offset`, with `nested_scales` fp32
    [N*K/64/256] and `offset` fp32 [1].
    """

    quant_type: ClassVar[str]
    """What bitsandbytes calls the 16 values of a code."""
    single: ClassVar[type[FourBitWeight]]
    """The same without scales of scales; itself where it has none."""
    bits = 4
    FEW_ROWS = "four_bit_gemv"
    IN_BITSANDBYTES: ClassVar = {"codes": "", "scales": ".absmax", "nested_scales": ".nested_absmax"}

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape)
        if shape[1] % 2:
            raise AssertionError(f"4-bit rows hold pairs of weights; got {shape[1]} columns")

    @property
    def nested(self) -> bool:
        """Whether the scales are quantized too; a slice of a double-quantized matrix may have plain ones."""
        return "nested_scales" in self._parameters

    @classmethod
    def used_for(cls, packed: type[PackedWeight]) -> type[PackedWeight] | None:
        """See `PackedWeight`: double-quantized or not, as it is."""
        return packed if packed in (cls, cls.single) else None

    @classmethod
    def stored_as(cls, parts: Mapping[str, Stored], shape: tuple[int, int], name: str) -> type[FourBitWeight]:
        """See `PackedWeight`: double-quantized or not, as the file's scales are."""
        nested = not parts.keys().isdisjoint(("nested_scales", "offset"))
        kind = cls if nested or ("scales" in parts and parts["scales"].dtype in _BYTES) else cls.single
        cls.refuse_missing(parts, kind.PARTS, name)
        for part, stored in parts.items():
            kept = kind.PARTS[part].dtype
            widths = _CODES if part == "codes" else _BYTES if kept == torch.uint8 else _FLOATS
            if stored.dtype not in widths:
                known = ", ".join(name for name in widths if name.isupper())
                raise CheckpointError(f"{name} has {part} of type {stored.dtype}; expected {known}.")
            found, expected = prod(stored.shape) * widths[stored.dtype], prod(kind.PARTS[part].shape(shape))
            if found != expected:
                raise CheckpointError(f"{name} of shape {shape} has {found} {part}; expected {expected}.")
        return kind

    @classmethod
    def cut(
        cls, state: PackedState, columns: int, name: str, rows: Tensor | None = None, span: Span = WHOLE
    ) -> PackedState:
        """See `PackedWeight`. Codes are copied byte for byte.

        Nested scales are kept where their groups of 256 blocks stay whole; elsewhere they are decoded to fp32 scales,
        which give the same weights.
        """
        state = {part: value.reshape(-1) for part, value in state.items()}
        state["codes"] = state["codes"].view(torch.uint8)  # some files store the bytes under another type
        if rows is None and span == WHOLE:
            return state
        dim, start, stop = span
        n, k = 2 * state["codes"].numel() // columns, columns
        taken = torch.arange(n) if rows is None else rows
        taken = taken[start:stop] if dim == 0 else taken
        first, last = (start, stop) if dim == 1 else (0, k)
        if k % BLOCK or first % BLOCK or last % BLOCK:
            raise uncuttable(name, k, BLOCK, first, last)
        per_row, top = k // BLOCK, int(taken[0])
        straight = (first, last) == (0, k) and bool((taken.diff() == 1).all())
        codes = state["codes"].view(n, k // 2)[taken, first // 2 : last // 2].reshape(-1)
        if "nested_scales" in state and straight and top * per_row % NESTED_BLOCK == 0:
            blocks = slice(top * per_row, (top + len(taken)) * per_row)
            groups = slice(blocks.start // NESTED_BLOCK, -(-blocks.stop // NESTED_BLOCK))
            scales = {"scales": state["scales"][blocks], "nested_scales": state["nested_scales"][groups]}
            return {"codes": codes, **scales, "offset": state["offset"]}
        scales = state["scales"]
        if "nested_scales" in state:
            scales = plain_scales(scales, levels(True, scales.device), state["nested_scales"], state["offset"])
        return {"codes": codes, "scales": scales.view(n, per_row)[taken, first // BLOCK : last // BLOCK].reshape(-1)}

    @torch.no_grad()
    def pack(self, weight: Tensor) -> None:
        """Quantize `weight` [N, K] on its own device; the same bits as bitsandbytes' `quantize_4bit` of the whole."""
        flat = weight.contiguous().view(-1)
        # On the CPU, pieces whose intermediates fit into the cache take a third of the time.
        piece = CPU_PIECE if weight.device.type == "cpu" else max(flat.numel(), 1)
        quantized = [
            torch.ops.bitsandbytes.quantize_4bit.default(part, BLOCK, self.quant_type, torch.uint8)
            for part in flat.split(piece)
        ]
        codes, scales = (torch.cat([part.view(-1) for part in parts]) for parts in zip(*quantized, strict=True))
        packed = {"codes": codes, "scales": scales}
        if self.nested:
            offset = scales.mean()
            packed["scales"], state = bnb.quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
            packed |= {"nested_scales": state.absmax, "offset": offset.view(1)}
        self.adopt(packed)

    @classmethod
    def bitsandbytes_config(cls, dtype: torch.dtype) -> dict[str, Any]:
        """See `PackedWeight`."""
        return {
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": cls.quant_type,
            "bnb_4bit_use_double_quant": "nested_scales" in cls.PARTS,
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
        }

    @classmethod
    def reads_bitsandbytes(cls, state: dict[str, Any]) -> bool:
        """See `PackedWeight`."""
        nested = "nested_offset" in state
        sizes = state.get("blocksize"), state.get("nested_blocksize", NESTED_BLOCK)
        return (state["quant_type"], nested, *sizes) == (cls.quant_type, cls is not cls.single, BLOCK, NESTED_BLOCK)

    @classmethod
    def has_codebook(cls, code: Tensor) -> bool:
        """See `PackedWeight`."""
        known = codebook_of(cls.quant_type)
        return code.shape == known.shape and torch.allclose(code.float(), known, atol=1e-6)

    def as_bitsandbytes(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `PackedWeight`."""
        scales_state = offset = None
        if self.nested:
            table, offset = levels(True, self.scales.device), self.offset.data[0]
            scales_state = bnb.QuantState(self.nested_scales.data, None, table, NESTED_BLOCK, dtype=torch.float32)
        table = codebook_of(self.quant_type).clone()
        state = bnb.QuantState(
            self.scales.data.view(-1), self.shape, table, BLOCK, self.quant_type, dtype, offset, scales_state
        )
        return {"": self.codes.data.view(-1, 1)} | {f".{k}": part for k, part in state.as_dict(packed=True).items()}

    @torch.no_grad()
    def unpack_into(self, out: Tensor) -> Tensor:
        """See `PackedWeight`."""
        return kernels.of("four_bit", out).dequantize(self.as_codes(), out)

    @staticmethod
    def product_kernel(weights: list[FourBitWeight], dtype: torch.dtype, device: torch.device) -> ModuleType | None:
        """The AVX512 kernel: each thread unpacks a few columns at a time and multiplies with them."""
        return kernels.fast("four_bit_product", device, dtype, *(weight.shape for weight in weights))

    @staticmethod
    def joined(weights: list[FewRowsWeight]) -> JoinedMatrices | None:
        """See `FewRowsWeight`."""
        codes = [weight.as_codes() for weight in weights]
        return (
            JoinedMatrices(codes, partial(kernels.decoding_kernel, "decoding_products"))
            if JoinedMatrices.can(codes)
            else None
        )

    def as_codes(self) -> Codes:
        """The matrix as kernels take it."""
        nested, device = None, self.codes.device
        if self.nested:
            nested = levels(True, device), self.nested_scales, self.offset
        table, scales = codebook_of(self.quant_type, device), self.scales.view(-1)
        return Codes(self.shape, self.codes, table, scales, nested, self.quant_type)

    def kernel_case(self) -> tuple[int, int]:
        """See `FewRowsWeight`."""
        return self.shape


class Nf4Single(FourBitWeight):
    """The 16 codes are quantiles of a normal distribution; scales are fp32."""

    name, quant_type = "nf4_single", "nf4"
    PARTS: ClassVar = {"codes": FlatPart(torch.uint8, 2), "scales": FlatPart(torch.float32, BLOCK)}


class Nf4(Nf4Single):
    """`Nf4Single`, double-quantized."""

    name = "nf4"
    PARTS: ClassVar = {
        "codes": FlatPart(torch.uint8, 2),
        "scales": FlatPart(torch.uint8, BLOCK),
        "nested_scales": FlatPart(torch.float32, BLOCK * NESTED_BLOCK),
        "offset": FlatPart(torch.float32, None),
    }


class Fp4Single(Nf4Single):
    """The 16 codes are floats of 4 bits; scales are fp32."""

    name, quant_type = "fp4_single", "fp4"


class Fp4(Nf4):
    """`Fp4Single`, double-quantized."""

    name, quant_type = "fp4", "fp4"


Nf4.single = Nf4Single.single = Nf4Single
Fp4.single = Fp4Single.single = Fp4Single
