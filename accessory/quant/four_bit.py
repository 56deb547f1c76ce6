"""NF4 and FP4: blocks of 64 weights, a 4-bit code each, one scale a block, and optionally 8-bit scales of scales.

The formats are those of QLoRA (Dettmers et al. 2023, sections 2 and 3), computed by bitsandbytes' functional
operations; the packed tensors are ours, because its modules repack and re-cast weights behind the caller's back.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor, nn

from accessory import kernels
from accessory.errors import CheckpointError
from accessory.kernels.avx512.four_bit_gemv import Matrices
from accessory.kernels.avx512.four_bit_matrix import takes
from accessory.kernels.bitsandbytes_library import functional as bnb
from accessory.kernels.codes import Beside, Codes
from accessory.kernels.plain import native
from accessory.quant.addition import Addition
from accessory.quant.packed import Low, PackedWeight
from accessory.quant.workspace import shared_memory

PackedState = dict[str, Tensor]
"""`FourBitWeight`'s tensors by name: codes, scales and, double-quantized, nested_scales and offset."""
CPU = torch.device("cpu")
BLOCK = 64  # weights that share one scale
CPU_PIECE = 1 << 18  # weights quantized at a time
NESTED_BLOCK = 256  # scales that share one scale of their own; fixed in bitsandbytes


@lru_cache
def nested_codebook(device: torch.device) -> Tensor:
    """The 256 values [256] fp32 an 8-bit scale can take; shared by every weight on `device`."""
    return bnb.create_dynamic_map().to(device)


@lru_cache
def codebook_of(quant_type: str, device: torch.device = CPU) -> Tensor:
    """The 16 values [16] fp32 that a 4-bit code of "nf4" or "fp4" stands for, before scaling."""
    return bnb.get_4bit_type(quant_type, device="cpu").to(device)


class FourBitWeight(PackedWeight):
    """W [N, K] as 4-bit codes, high nibble first, row-major blocks of 64.

    Parameters (frozen): `codes` uint8 [N*K/2] and `scales`, fp32 [N*K/64] when single-level. Double-quantized
    (`nested`), `scales` is uint8 and decodes as `nested_codebook[scales] * nested_scales + offset`, with
    `nested_scales` fp32 [N*K/64/256] and `offset` fp32 [1].
    """

    def __init__(self, shape: tuple[int, int], *, quant_type: str = "nf4", nested: bool = True) -> None:
        super().__init__(shape)
        if shape[1] % 2:
            raise AssertionError(f"4-bit rows hold pairs of weights; got {shape[1]} columns")
        self.quant_type, self.nested = quant_type, nested
        self.together: Matrices | None = None
        self.together_with: list[PackedWeight] = []
        numel = shape[0] * shape[1]
        blocks = -(-numel // BLOCK)
        self.codes = _frozen(torch.empty(numel // 2, dtype=torch.uint8, device="meta"))
        self.scales = _frozen(torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32, device="meta"))
        if nested:
            self.nested_scales = _frozen(torch.empty(-(-blocks // NESTED_BLOCK), device="meta"))
            self.offset = _frozen(torch.empty(1, device="meta"))

    @torch.no_grad()
    def pack(self, weight: Tensor) -> None:
        """Quantize `weight` [N, K] on its own device; the same bits as bitsandbytes' `quantize_4bit` of the whole."""
        self.together = None
        flat = weight.contiguous().view(-1)
        # On the CPU pieces whose intermediates stay in the cache take a third of the time of the whole at once.
        piece = CPU_PIECE if weight.device.type == "cpu" else max(flat.numel(), 1)
        quantized = [
            torch.ops.bitsandbytes.quantize_4bit.default(part, BLOCK, self.quant_type, torch.uint8)
            for part in flat.split(piece)
        ]
        self.codes = _frozen(torch.cat([codes.view(-1) for codes, _ in quantized]))
        scales = torch.cat([scales for _, scales in quantized])
        if self.nested:
            offset = scales.mean()
            scales, state = bnb.quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
            self.nested_scales, self.offset = _frozen(state.absmax), _frozen(offset.view(1))
        self.scales = _frozen(scales)

    def adopt(self, state: PackedState) -> None:
        """Take codes and statistics as they are; those of a slice may be single-level though the rest are nested."""
        self.nested, self.together = "nested_scales" in state, None
        for name in ("codes", "scales", "nested_scales", "offset"):
            self._parameters.pop(name, None)
            if name in state:
                setattr(self, name, _frozen(state[name]))

    def as_bitsandbytes(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What bitsandbytes stores of such a matrix, by what it appends to the weight's name; unpacks to `dtype`."""
        state = _quant_state(self, dtype).as_dict(packed=True)
        return {"": self.codes.data.view(-1, 1)} | {f".{key}": value for key, value in state.items()}

    @torch.no_grad()
    def unpack(self, dtype: torch.dtype) -> Tensor:
        """Dequantize to [N, K] in `dtype`."""
        if dtype == torch.float64:  # which bitsandbytes does not know
            return self.unpack(torch.float32).double()
        if kernels.computing(self.codes.device, dtype) == "triton":
            return self._unpack_by_kernel(dtype)
        return torch.ops.bitsandbytes.dequantize_4bit.default(
            self.codes.view(-1, 1), self._plain_scales(), BLOCK, self.quant_type, _whole_blocks(self.shape), dtype
        ).view(self.shape)

    def borrow(self, dtype: torch.dtype) -> Tensor:
        """As `unpack`, the same bits, into memory that all matrices share: later ones overwrite it."""
        if kernels.computing(self.codes.device, dtype) == "triton":
            return self._unpack_by_kernel(dtype, shared_memory(self.shape, dtype, self.codes.device))
        if not (native.AVAILABLE and self.codes.is_cpu and dtype in native.DTYPES):
            return self.unpack(dtype)
        matrix = shared_memory(self.shape, dtype, self.codes.device)
        by_blocks = matrix.view(_whole_blocks(self.shape))
        native.unpack_into(by_blocks, self.codes, self._plain_scales(), BLOCK, self.quant_type)
        return matrix

    @staticmethod
    def fused_sum(
        factors: list[Tensor],
        weights: list[FourBitWeight],
        *,
        transposed: bool,
        bias: Tensor | None,
        low: Low | None,
    ) -> Tensor | None:
        """By this CPU's kernel: it unpacks a few columns at a time, where they are multiplied with."""
        kernel = _product_kernel(weights, factors[0].dtype, factors[0].device)
        if kernel is None:
            return None
        return kernel.sum_of_products(
            factors, [w._as_codes() for w in weights], transposed=transposed, bias=bias, low=low
        )

    @staticmethod
    def fused_bytes(
        weights: list[FourBitWeight],
        rank: int,
        rows: int,
        *,
        transposed: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> int | None:
        """The workspace of all threads."""
        kernel = _product_kernel(weights, dtype, device)
        return kernel and kernel.workspace_bytes(
            [weight.shape for weight in weights], rank, rows, transposed=transposed
        )

    def _as_codes(self) -> Codes:
        nested, device = None, self.codes.device
        if self.nested:
            nested = nested_codebook(device), self.nested_scales, self.offset
        return Codes(self.shape, self.codes, codebook_of(self.quant_type, device), self.scales, nested, self.quant_type)

    def decode(self, x: Tensor, others: list[PackedWeight], additions: list[Addition]) -> tuple[Tensor, ...] | None:
        """By this CPU's kernel for few rows, in one call."""
        if self.together is None or not self.together.takes(x) or self.together_with != others:
            return None
        there = any(addition.bias is not None or addition.a is not None for addition in additions)
        # A list of nothing is left out: for one token, making it takes longer than multiplying.
        beside = [Beside(*addition[:4]) for addition in additions] if there else None
        return self.together.multiply(x, beside)

    @torch.no_grad()
    def prepare_decoding(self, others: list[PackedWeight]) -> None:
        """Keep the addresses of all, where there is a kernel for them."""
        weights = [self, *others]
        if not all(isinstance(weight, FourBitWeight) and takes(weight.shape) for weight in weights):
            return
        if kernels.computing(self.codes.device, torch.bfloat16) == "avx512":
            kernel = kernels.on("four_bit_gemv", self.codes.device, torch.bfloat16)
            self.together, self.together_with = kernel.Matrices([w._as_codes() for w in weights]), others

    def train(self, mode: bool = True) -> FourBitWeight:
        """As every module's; addresses are kept for no longer than they are of use."""
        self.together = None if mode else self.together
        return super().train(mode)

    def _unpack_by_kernel(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return kernels.on("four_bit", self.codes.device, dtype).dequantize(self._as_codes(), dtype, out)

    def _plain_scales(self) -> Tensor:
        return plain_scales(self.scales, self.nested_scales, self.offset) if self.nested else self.scales


def _product_kernel(weights: list[FourBitWeight], dtype: torch.dtype, device: torch.device) -> ModuleType | None:
    if kernels.computing(device, dtype) != "avx512" or not all(takes(weight.shape) for weight in weights):
        return None
    return kernels.on("four_bit_product", device, dtype)


def _whole_blocks(shape: torch.Size) -> tuple[int, int]:
    """A shape of as many numbers whose rows are whole blocks.

    On the CPU bitsandbytes 0.50.2 takes every row to begin a new block when it unpacks, though it packs across rows.
    """
    n, k = shape
    if k % BLOCK == 0:
        return n, k
    return (n * k // BLOCK, BLOCK) if n * k % BLOCK == 0 else (1, n * k)


def _quant_state(matrix: FourBitWeight, dtype: torch.dtype) -> bnb.QuantState:
    nested = None
    if matrix.nested:
        code = nested_codebook(matrix.scales.device)
        nested = bnb.QuantState(
            absmax=matrix.nested_scales.data, code=code, blocksize=NESTED_BLOCK, dtype=torch.float32
        )
    return bnb.QuantState(
        absmax=matrix.scales.data,
        shape=matrix.shape,
        code=codebook_of(matrix.quant_type).clone(),
        blocksize=BLOCK,
        quant_type=matrix.quant_type,
        dtype=dtype,
        offset=matrix.offset.data[0] if matrix.nested else None,
        state2=nested,
    )


def plain_scales(scales: Tensor, nested_scales: Tensor, offset: Tensor) -> Tensor:
    """Double-quantized statistics as the fp32 ones [blocks] they stand for."""
    return native.plain_scales(scales, nested_codebook(scales.device), nested_scales, offset)


def slice_packed(
    state: PackedState,
    shape: tuple[int, int],
    *,
    name: str,
    rows: Tensor | None = None,
    dim: int | None = None,
    start: int = 0,
    stop: int = 0,
) -> PackedState:
    """The packed form of some rows of a packed matrix [N, K], and of the range [start, stop) along `dim` of those.

    Codes are copied byte for byte. Scales of scales are kept where their groups of 256 blocks stay whole; elsewhere the
    fp32 scales they stand for are, which multiply to the same numbers. Raises `CheckpointError` where the cut would go
    through blocks of 64.
    """
    if rows is None and dim is None:
        return state
    n, k = shape
    taken = torch.arange(n) if rows is None else rows
    taken = taken[start:stop] if dim == 0 else taken
    columns = (start, stop) if dim == 1 else (0, k)
    if k % BLOCK or columns[0] % BLOCK or columns[1] % BLOCK:
        raise CheckpointError(
            f"{name}: its {k} columns are packed in blocks of {BLOCK} that cannot be cut at {columns[0]}:{columns[1]}; "
            "choose another --model_parallel_size, or give the full-precision checkpoint."
        )
    per_row, first = k // BLOCK, int(taken[0])
    straight = columns == (0, k) and bool((taken.diff() == 1).all())
    aligned = first * per_row % NESTED_BLOCK == 0
    codes = state["codes"].view(n, k // 2)[taken, columns[0] // 2 : columns[1] // 2].reshape(-1)
    if "nested_scales" in state and straight and aligned:
        blocks = slice(first * per_row, (first + len(taken)) * per_row)
        groups = slice(blocks.start // NESTED_BLOCK, -(-blocks.stop // NESTED_BLOCK))
        scales = {"scales": state["scales"][blocks], "nested_scales": state["nested_scales"][groups]}
        return {"codes": codes, **scales, "offset": state["offset"]}
    scales = state["scales"]
    if "nested_scales" in state:
        scales = plain_scales(scales, state["nested_scales"], state["offset"])
    cut = scales.view(n, per_row)[taken, columns[0] // BLOCK : columns[1] // BLOCK]
    return {"codes": codes, "scales": cut.reshape(-1)}


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
