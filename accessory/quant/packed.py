"""The interface of a storage format: one class a format, the only place that knows anything about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from accessory.errors import CheckpointError
from accessory.kernels.addition import Addition
from accessory.kernels.single_precision import product
from accessory.quant.ahead import active
from accessory.quant.workspace import unpack_buffer

Span = tuple[int | None, int, int]
"""(dimension, start, stop): a range of a matrix; no dimension: the whole."""
WHOLE: Span = (None, 0, 0)
PackedState = dict[str, Tensor]
"""The parts of a packed matrix by name."""


class Part(NamedTuple):
    """One tensor of a packed W [N, K]: a number for each `block` columns of a row, [N, K / block], or each row, [N].

    trained: whether a run with a frozen base trains it, as an fp32 parameter that is cut as W is.
    """

    dtype: torch.dtype
    block: int | None = 1
    trained: bool = False

    def shape(self, of: tuple[int, int]) -> tuple[int, ...]:
        """The part's shape for a matrix `of` [N, K]."""
        return of[:1] if self.block is None else (of[0], of[1] // self.block)


class Stored(Protocol):
    """A tensor in a file: its type in that file's words (F32 or float32), and its shape."""

    dtype: str
    shape: tuple[int, ...]


class PackedWeight(nn.Module, ABC):
    """A matrix W [N, K] stored in fewer bits, which is unpacked for each product, by its user or by a kernel.

    Its parts are parameters, so that data parallelism can shard them, and frozen unless `PARTS` marks them trained.
    It knows no process group: under tensor parallelism W is this rank's slice.
    """

    name: ClassVar[str]
    """The name in `--quant_type` and in files."""
    bits: ClassVar[int]
    """Of a code."""
    PARTS: ClassVar[dict[str, Part]]
    """`codes`, and what else a format has."""
    trained: ClassVar[tuple[str, ...]] = ()
    """Names of the parts that are trained."""
    moved: ClassVar[tuple[str, ...]] = ()
    """Names of the parts that training changes, though they have no gradient."""
    filed: ClassVar[type[PackedWeight]]
    """The storage in which files have the matrix: this one, unless it is a form of another for training."""
    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    """Parts that variants of the same name have."""
    waits: ClassVar[bool] = False
    """Whether a product makes the host wait for a number from the GPU."""
    IN_BITSANDBYTES: ClassVar[dict[str, str]] = {}
    """Part -> suffix of the weight's name in bitsandbytes' files; empty if bitsandbytes has no such format."""

    def __init_subclass__(cls) -> None:
        cls.trained = tuple(name for name, part in getattr(cls, "PARTS", {}).items() if part.trained)
        cls.filed = cls

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        for name, part in self.PARTS.items():
            self.register_parameter(name, frozen(torch.empty(part.shape(shape), dtype=part.dtype, device="meta")))

    @classmethod
    def used_for(cls, packed: type[PackedWeight]) -> type[PackedWeight] | None:
        """What `--quant_type` with this name means for a base that is `packed` already; None: it would be repacked."""
        return cls if packed is cls else None

    @classmethod
    def stored_as(cls, parts: Mapping[str, Stored], shape: tuple[int, int], name: str) -> type[PackedWeight]:
        """The storage of the matrix `name` that a file holds as `parts`: this one, or a variant of the same name.

        Raises `CheckpointError` for a missing part, and for one whose type or shape does not make the matrix.
        """
        cls.refuse_missing(parts, cls.PARTS, name)
        for part, stored in parts.items():
            dtype, expected = cls.PARTS[part].dtype, cls.PARTS[part].shape(shape)
            if stored.dtype not in _words(dtype) or tuple(stored.shape) != expected:
                raise CheckpointError(
                    f"{name} has {part} of type {stored.dtype} and shape {tuple(stored.shape)}; expected "
                    f"{_words(dtype)[0]} of {expected}."
                )
        return cls

    @staticmethod
    def refuse_missing(parts: Mapping[str, Stored], wanted: Mapping[str, Any], name: str) -> None:
        """Raise `CheckpointError` where the matrix `name` lacks one of the `wanted` parts."""
        if absent := [part for part in wanted if part not in parts]:
            raise CheckpointError(f"{name} is packed, but its {', '.join(absent)} is missing.")

    @classmethod
    def of_range(cls, columns: int, span: Span) -> type[PackedWeight]:
        """The storage of the range `span` of a matrix with so many columns, as `cut` gives its parts."""
        return cls

    @classmethod
    def cut(
        cls, state: PackedState, columns: int, name: str, rows: Tensor | None = None, span: Span = WHOLE
    ) -> PackedState:
        """The parts for `rows` of a matrix `name` [N, columns], and then for the range `span` of those.

        They unpack to the same weights as the whole. Raises `CheckpointError` for a cut through a block.
        """
        found, (dim, start, stop) = {}, span
        for part, value in state.items():
            block = cls.PARTS[part].block
            value = value if rows is None else value[rows]
            if dim == 0:
                value = value[start:stop]
            elif dim == 1 and block is not None:
                if start % block or stop % block:
                    raise uncuttable(name, columns, block, start, stop)
                value = value[:, start // block : stop // block]
            found[part] = value.contiguous()
        return found

    @abstractmethod
    def pack(self, weight: Tensor) -> None:
        """Fill the parts from `weight` [N, K] in any float dtype, on the device where it lies."""

    def pack_range(self, read: Callable[[int | None, int, int], Tensor], columns: int, span: Span = WHOLE) -> None:
        """Fill the parts from the range `span` of a matrix with so many columns, of which `read` gives any range."""
        self.pack(read(*span))

    def adopt(self, state: PackedState) -> None:
        """Use parts, by name, that are packed already."""
        for name in self.PARTS:
            self._parameters.pop(name, None)
            if name in state:
                self.register_parameter(name, frozen(state[name]))

    @abstractmethod
    def unpack_into(self, out: Tensor) -> Tensor:
        """Fill `out` [N, K] with the matrix in out's dtype; returns it."""

    def unpack_bytes(self, device: torch.device) -> int:
        """Bytes that `unpack_into` works in."""
        return 0

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The matrix [N, K] in `dtype`."""
        return self.unpack_into(torch.empty(self.shape, dtype=dtype, device=self.codes.device))

    def unpack_to_buffer(self, dtype: torch.dtype) -> Tensor:
        """The same bits in the buffer that all matrices share, for one product: later calls, of any, overwrite it."""
        if (ahead := active()) is not None:
            return ahead.unpack(self, dtype)
        return self.unpack_into(unpack_buffer(self.shape, dtype, self.codes.device))

    def add_product(self, y: Tensor | None, x: Tensor) -> Tensor:
        """x [T, K] -> y + x W^T [T, N] in x's dtype. y: [T, N], which may be overwritten, or [N], or None: nothing."""
        return plus_product(y, x, self.unpack_to_buffer(x.dtype).t())

    def product_bytes(self, rows: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
        """Of `add_product` with x [rows, K] in `dtype`: (bytes it works in, numbers of the buffer it unpacks into)."""
        return self.unpack_bytes(device), self.shape.numel()

    @classmethod
    def bitsandbytes_config(cls, dtype: torch.dtype) -> dict[str, Any]:
        """The quantization config of config.json for such matrices in bitsandbytes' format, computed in `dtype`."""
        raise AssertionError(f"{cls.name} has no form in bitsandbytes")

    def as_bitsandbytes(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors that bitsandbytes stores of the matrix, by suffix of the weight's name."""
        raise AssertionError(f"{self.name} has no form in bitsandbytes")

    @classmethod
    def reads_bitsandbytes(cls, state: dict[str, Any]) -> bool:
        """Whether a matrix with bitsandbytes' quantization state `state` is in this format."""
        return False

    @classmethod
    def has_codebook(cls, code: Tensor) -> bool:
        """Whether `code`, the code values that bitsandbytes wrote for such a matrix, are those of this format."""
        raise AssertionError(f"{cls.name} has no form in bitsandbytes")

    @property
    def nbytes(self) -> int:
        """Bytes of the parts; equal on the meta device and on a real one."""
        return sum(p.numel() * p.element_size() for p in self.parameters())

    def gradients(self, x: Tensor, dy: Tensor) -> list[Tensor]:
        """Of the trained parts, from x [T, K] and the gradient dy [T, N] of x W^T; dW is never formed whole."""
        raise AssertionError(f"{self.name} trains nothing")

    def gradients_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that `gradients` works in, of x and dy in `dtype`."""
        raise AssertionError(f"{self.name} trains nothing")

    @staticmethod
    def product_kernel(weights: list[PackedWeight], dtype: torch.dtype, device: torch.device) -> ModuleType | None:
        """The kernel that sums products with such matrices without unpacking them whole; None if there is none.

        It has `sum_of_products`, given each matrix's `as_codes()`, and `workspace_bytes`: see
        `accessory.kernels.avx512.four_bit_product`.
        """
        return None

    def as_codes(self) -> Any:
        """The matrix as that kernel takes it."""
        raise AssertionError(f"{self.name} has no product kernel")

    def prepare_decoding(self, others: list[PackedWeight]) -> None:
        """Prepare `decode_products` of this matrix and `others`, if the format has a kernel for them.

        Training and new contents undo it.
        """

    def decode_products(self, x: Tensor, others: list[PackedWeight], additions: list[Addition]) -> tuple | None:
        """x [T, K], few rows -> [T, N] of this matrix and of `others`: x W^T and its addition, without a gradient.

        None if they were not prepared together, or not for such an x.
        """
        return None

    def extra_repr(self) -> str:
        """The logical shape, for `print(model)`."""
        return f"{tuple(self.shape)}"


def plus_product(y: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """y + a b, with y [T, N], which is overwritten, or [N]; without y, a b alone."""
    return product(a, b) if y is None else y.addmm_(a, b) if y.dim() == 2 else torch.addmm(y, a, b)


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter without a gradient."""
    return nn.Parameter(tensor, requires_grad=False)


def uncuttable(name: str, columns: int, block: int, start: int, stop: int) -> CheckpointError:
    """The error for a cut through a block."""
    return CheckpointError(
        f"{name}: its {columns} columns are packed in blocks of {block} that cannot be cut at {start}:{stop}; "
        "choose another --model_parallel_size, or give the full-precision checkpoint."
    )


def _words(dtype: torch.dtype) -> tuple[str, str]:
    """safetensors' and torch's names of a dtype."""
    word = str(dtype).removeprefix("torch.")
    return word[0].upper() + word.lstrip("abcdefghijklmnopqrstuvwxyz"), word
