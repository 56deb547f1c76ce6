"""Codes of 2, 3 and 4 bits: whole numbers, with a scale and a zero for each group of 32, 64 or 128 columns of a row.

The grid of GreenBit, GPTQ and AWQ. Here are its storages and what they have in common; weights are fitted to the grid
in `accessory.quant.group_fit` and, with whole zero points, in `accessory.quant.whole_points`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from math import gcd
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from accessory import kernels
from accessory.errors import CheckpointError
from accessory.kernels.addition import Addition
from accessory.kernels.codes import GroupCodes, whole_numbers
from accessory.kernels.few_rows import JoinedGroups
from accessory.kernels.plain.group_codes import workspace_bytes
from accessory.quant.few_rows import FewRowsWeight
from accessory.quant.group_fit import fit
from accessory.quant.packed import WHOLE, PackedState, PackedWeight, Part, Span, Stored, uncuttable
from accessory.quant.whole_points import fit_whole

BITS = (2, 3, 4)
GROUPS = (32, 64, 128)
"""Columns that share a scale, in storages that a matrix can be packed in."""
FEWEST = 8
"""Columns that a group has at least, where a matrix is cut between ranks in the middle of one."""


_STATISTICS = ("scales", "zeros", "points")


class GroupPart(Part):
    """A number for each `block` columns of a row, the last of which may have fewer."""

    def shape(self, of: tuple[int, int]) -> tuple[int, ...]:
        """[N, ceil(K / block)] of a matrix `of` [N, K]."""
        return of[0], -(-of[1] // self.block)


class FixedPart(Part):
    """`block` numbers for each row, however many columns it has."""

    def shape(self, of: tuple[int, int]) -> tuple[int, ...]:
        """[N, block] of a matrix `of` [N, K]."""
        return of[0], self.block


class ColumnPart(Part):
    """A number for each column."""

    def shape(self, of: tuple[int, int]) -> tuple[int, ...]:
        """[K] of a matrix `of` [N, K]."""
        return of[1:]


class GroupWeight(FewRowsWeight):
    """W [N, K] as codes in groups: see `GroupCodes`, whose names and layouts the parts have.

    Variants of a storage have other parts too: `points` instead of zeros, `order`, `channel_scale`, and `groups`, which
    a matrix with an order has when it is cut by columns.
    """

    group: ClassVar[int]
    """Columns of a row that share a scale."""
    whole: ClassVar[type[GroupWeight]]
    """The storage of the matrix that this one is a range of columns of: itself, or one of larger groups."""
    FEW_ROWS = "group_codes_gemv"
    apart = False
    """Whether this matrix, and each that shares its input, is multiplied in a call of its own while decoding."""
    OPTIONAL = ("points", "order", "channel_scale", "groups")

    @classmethod
    def has(cls, part: str) -> bool:
        """Whether it is a variant with this part."""
        return part in cls.PARTS

    @classmethod
    def used_for(cls, packed: type[PackedWeight]) -> type[PackedWeight] | None:
        """See `PackedWeight`: every variant, as it is."""
        return packed if packed.name == cls.name else None

    @classmethod
    def stored_as(cls, parts: Mapping[str, Stored], shape: tuple[int, int], name: str) -> type[GroupWeight]:
        """See `PackedWeight`."""
        stored = [part for part in cls.OPTIONAL if part != "groups"]
        kind = group_storage(cls.bits, cls.group, tuple(part for part in stored if part in parts))
        if surplus := [part for part in parts if part not in kind.PARTS]:
            raise CheckpointError(
                f"{name} has {', '.join(surplus)}, which do not go with {', '.join(kind.PARTS)}; expected these alone."
            )
        return super(GroupWeight, kind).stored_as(parts, shape, name)

    @classmethod
    def of_range(cls, columns: int, span: Span) -> type[GroupWeight]:
        """See `PackedWeight`: where it begins or ends inside a group, groups are smaller, and as many columns each."""
        dim, start, stop = span
        if dim != 1 or (start, stop) == (0, columns):
            return cls
        if cls.has("order"):
            return indexed(cls, columns)
        return regrouped(cls, gcd(cls.group, start, stop - start))

    @classmethod
    def cut(
        cls, state: PackedState, columns: int, name: str, rows: Tensor | None = None, span: Span = WHOLE
    ) -> PackedState:
        """See `PackedWeight`. Statistics of a group that a cut goes through are repeated for its smaller groups."""
        dim, start, stop = span
        by_column = {part: state[part] for part in ("order", "channel_scale", "groups") if part in state}
        by_row = {part: value for part, value in state.items() if part not in by_column}
        if "order" in by_column and not _is_order(by_column["order"], columns):
            raise CheckpointError(f"{name}: its order is not one of its {columns} columns; expected each of them once.")
        found = super().cut(by_row, columns, name, rows, span if dim == 0 else WHOLE) | by_column
        if dim != 1 or (start, stop) == (0, columns):
            return found
        if "order" in found:
            return _channels(found, cls, start, stop)
        kind = cls.of_range(columns, span)
        if start % FEWEST or kind.group % FEWEST:
            raise uncuttable(name, columns, FEWEST, start, stop)
        return cls.columns_of(found, kind.group, start, stop)

    @classmethod
    def columns_of(cls, state: PackedState, group: int, start: int, stop: int) -> PackedState:
        """The parts for the columns from `start` to `stop` in smaller groups, which divide ours and where we cut."""
        groups, found = torch.arange(start, stop, group) // cls.group, {}
        for part, value in state.items():
            block = cls.PARTS[part].block
            kept = groups if part in _STATISTICS else slice(start // block, -(-stop // block))
            found[part] = value[..., kept].contiguous()
        return found

    @torch.no_grad()
    def pack(self, weight: Tensor) -> None:
        """Fit codes, scales and zeros or points to `weight` [N, K] on its own device, by least squares (see `fit`).

        A row's result does not depend on other rows. Raises `CheckpointError` for weights that fp16 cannot hold.
        """
        name, fitted = ("points", fit_whole) if self.has("points") else ("zeros", fit)
        codes, scales, zeros = fitted(weight, self.bits, self.group)
        if not (scales.isfinite().all() and zeros.isfinite().all()):
            raise CheckpointError(f"--quant_type {self.name}: a matrix of {tuple(weight.shape)} has weights that fp16 "
                                  "cannot hold; expected finite ones of at most 65504.")  # fmt: skip
        self.adopt(packed_codes(codes, self.bits) | {"scales": scales, name: zeros})

    def pack_range(self, read: Callable[[int | None, int, int], Tensor], columns: int, span: Span = WHOLE) -> None:
        """See `PackedWeight`: groups that the range cuts through are packed whole, and then cut."""
        group = self.whole.group
        dim, start, stop = span
        if dim != 1 or self.group == group:
            self.pack(read(*span))
            return
        first, last = start // group * group, min(-(-stop // group) * group, columns)
        around = self.whole((self.shape[0], last - first))
        around.pack(read(1, first, last))
        state = {part: value.detach() for part, value in around.named_parameters()}
        self.adopt(self.whole.columns_of(state, self.group, start - first, stop - first))

    def adopt(self, state: PackedState) -> None:
        """See `PackedWeight`. Raises `AssertionError` for other parts than this variant's."""
        if state.keys() != self.PARTS.keys():
            raise AssertionError(f"parts {', '.join(state)} for {self.name} with {', '.join(self.PARTS)}")
        super().adopt(state)

    def has_own_input(self) -> bool:
        """Whether `packed_input` changes x."""
        return self.has("order") or self.has("channel_scale")

    def packed_input(self, x: Tensor) -> Tensor:
        """x [T, K], the input of a product with the matrix, as its packed columns are multiplied with it."""
        if self.has("channel_scale"):
            x = x * self.channel_scale.to(x.dtype)
        return x[:, self.order] if self.has("order") else x

    def as_codes(self) -> GroupCodes:
        """The matrix as kernels take it."""
        parts = {name: getattr(self, name, None) for name in ("high", "zeros", *self.OPTIONAL)}
        return GroupCodes(tuple(self.shape), self.bits, self.group, self.codes, scales=self.scales, **parts)

    @torch.no_grad()
    def unpack_into(self, out: Tensor) -> Tensor:
        """See `PackedWeight`."""
        return kernels.of("group_codes", out).dequantize(self.as_codes(), out)

    def unpack_bytes(self, device: torch.device) -> int:
        """See `PackedWeight`: of plain PyTorch's kernel."""
        return workspace_bytes(self.shape, device, ordered=self.has("order"))

    def kernel_case(self) -> GroupCodes:
        """See `FewRowsWeight`."""
        return self.decoded_codes()

    def decoded_codes(self) -> GroupCodes:
        """See `FewRowsWeight`: for an x that is `packed_input` already."""
        return self.as_codes()._replace(order=None, channel_scale=None)

    @staticmethod
    def joined(weights: list[FewRowsWeight]) -> JoinedGroups:
        """See `FewRowsWeight`."""
        codes = [weight.decoded_codes() for weight in weights]
        return JoinedGroups(codes, partial(kernels.decoding_kernel, "decoding_groups"))

    def prepare_decoding(self, others: list[PackedWeight]) -> None:
        """See `PackedWeight`. If any matrix has its own order or scale of channels, each is multiplied by its own x."""
        weights = [self, *others]
        self.apart = any(isinstance(w, GroupWeight) and w.has_own_input() for w in weights)
        if not self.apart:
            super().prepare_decoding(others)
        elif all(isinstance(w, GroupWeight) for w in weights):
            for weight in weights:
                FewRowsWeight.prepare_decoding(weight, [])

    def decode_products(self, x: Tensor, others: list[PackedWeight], additions: list[Addition]) -> tuple | None:
        """See `PackedWeight`. LoRA is not computed with a changed x."""
        if not self.apart:
            return super().decode_products(x, others, additions)
        weights = [self, *others]
        lora = any(addition.a is not None for addition in additions)
        if lora or not all(isinstance(w, GroupWeight) and w.prepared and w.prepared.takes(x) for w in weights):
            return None
        beside = [None if addition.bias is None else [addition] for addition in additions]
        return tuple(w.prepared.multiply(w.packed_input(x), more)[0] for w, more in zip(weights, beside, strict=True))

    @staticmethod
    def product_kernel(weights: list[GroupWeight], dtype: torch.dtype, device: torch.device) -> ModuleType | None:
        """The AVX512 kernel, as of 4-bit codes; widths and groups may be mixed."""
        return kernels.fast("group_codes_product", device, dtype, *(weight.as_codes() for weight in weights))


def packed_codes(codes: Tensor, bits: int) -> PackedState:
    """Whole numbers uint8 [N, K] -> `codes` and, of 3 bits, `high`, as `GroupCodes` has them."""
    if bits == 4:
        return {"codes": _bytes(codes, 4)}
    if bits == 2:
        return {"codes": _bytes(codes, 2)}
    return {"codes": _bytes(codes & 3, 2), "high": _bytes(codes >> 2, 1)}


def _bytes(numbers: Tensor, width: int) -> Tensor:
    """Numbers of `width` bits, uint8 [N, K], put into bytes, the first in the lowest bits."""
    count = 8 // width
    apart = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % count)).unflatten(1, (-1, count))
    result = apart[:, :, 0].clone()
    for place in range(1, count):
        result |= apart[:, :, place] << (width * place)
    return result


def _channels(state: PackedState, kind: type[GroupWeight], start: int, stop: int) -> PackedState:
    """The parts for the columns of the channels from `start` to `stop`, in the order in which they lie; all groups."""
    order = state["order"]
    columns = len(order)
    groups = state.get("groups", torch.arange(columns, dtype=torch.int32, device=order.device) // kind.group)
    chosen = ((order >= start) & (order < stop)).nonzero()[:, 0]
    numbers = whole_numbers(state["codes"], state.get("high"), kind.bits, columns)[:, chosen]
    found = state | packed_codes(numbers, kind.bits) | {"order": order[chosen] - start, "groups": groups[chosen]}
    if "channel_scale" in state:
        found["channel_scale"] = state["channel_scale"][start:stop].contiguous()
    return found


def _is_order(order: Tensor, columns: int) -> bool:
    return torch.equal(order.sort().values, torch.arange(columns, dtype=order.dtype, device=order.device))


def group_storage(bits: int, group: int, also: tuple[str, ...] = ()) -> type[GroupWeight]:
    """The storage of `bits` bits in groups of `group`; also: the parts, in `OPTIONAL`'s order, that a variant has."""
    return _group_storage(bits, group, also)


@lru_cache
def _group_storage(bits: int, group: int, also: tuple[str, ...]) -> type[GroupWeight]:
    # A function of its own, because a cache takes arguments that are left out for others than their defaults.
    parts = {"codes": GroupPart(torch.uint8, 2 if bits == 4 else 4)}
    if bits == 3:
        parts["high"] = GroupPart(torch.uint8, 8)
    parts["scales"] = GroupPart(torch.float16, group)
    optional = {
        "points": GroupPart(torch.uint8, group),
        "order": ColumnPart(torch.int32),
        "channel_scale": ColumnPart(torch.float16),
        "groups": ColumnPart(torch.int32),
    }
    parts |= {} if "points" in also else {"zeros": GroupPart(torch.float16, group)}
    parts |= {part: optional[part] for part in also}
    about = f"Whole numbers of {bits} bits in groups of {group}"
    kind = _made(GroupWeight, f"int{bits}_g{group}", f"{about}{' with ' * bool(also)}{', '.join(also)}.", parts)
    kind.bits, kind.group, kind.whole = bits, group, kind
    return kind


def group_storage_named(name: str) -> type[GroupWeight] | None:
    """`int4_g1024` and the like; None for other names."""
    found = re.fullmatch(r"int([234])_g([1-9]\d{0,5})", name)
    return group_storage(int(found[1]), int(found[2])) if found else None


@lru_cache
def regrouped(kind: type[GroupWeight], group: int) -> type[GroupWeight]:
    """The storage of a range of a matrix of `kind`, with smaller groups: of `group` columns."""
    if group == kind.group:
        return kind
    parts = {name: part._replace(block=group) if name in _STATISTICS else part for name, part in kind.PARTS.items()}
    smaller = _made(kind, kind.name, f"A range of a matrix of {kind.name}, in groups of {group}.", parts)
    smaller.group = group
    return smaller


@lru_cache
def indexed(kind: type[GroupWeight], columns: int) -> type[GroupWeight]:
    """The storage of some channels of a matrix of `kind` with an order and so many columns: it has all its groups."""
    if kind.has("groups"):
        return kind
    parts = {
        name: FixedPart(part.dtype, -(-columns // kind.group), part.trained) if name in _STATISTICS else part
        for name, part in kind.PARTS.items()
    }
    return _made(kind, kind.name, f"Channels of a matrix of {kind.name}.", parts | {"groups": ColumnPart(torch.int32)})


def _made(base: type[GroupWeight], name: str, about: str, parts: dict[str, Part]) -> type[GroupWeight]:
    body = {"name": name, "PARTS": parts, "__doc__": about, "__module__": __name__}
    return type(name.title().replace("_", ""), (base,), body)


GROUP_STORAGES = tuple(group_storage(bits, group) for bits in BITS for group in GROUPS)
"""What `--quant_type` has of them."""
