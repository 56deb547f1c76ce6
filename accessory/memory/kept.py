"""Measures what a forward keeps for its backward, by running a few tokens through a stand-in for the decoder.

The stand-in's parameters are uninitialized, and those of one shape share memory: a model of any size can be measured
before it is read. autograd's hooks see every saved tensor, whatever the method or the block. Bytes are linear in the
tokens, so two lengths suffice. (The meta device would take a second: it runs Python and loads PyTorch's compiler.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from accessory.method import Attachment
from accessory.model.attention import Attention
from accessory.model.decoder import Decoder
from accessory.model.sequences import Sequences
from accessory.parallel.tensor import without_communication

_FEW, _MORE = 2, 4  # tokens


@dataclass(frozen=True)
class KeptByBlock:
    """Bytes that one block keeps for its backward.

    all: everything, with its input if that is kept. input: size of its input, which is kept if it is run again.
    after_attention: the part of `all` that is saved after attention and freed before attention's backward. after_block:
    what is saved between it and the next, such as its output by a network beside the blocks. held: what is alive of
    blocks' inputs and outputs when it begins, its own input too, though it is not kept. keeps_input, keeps_attended:
    whether its input is kept, and the input of `wo`. goes_back: whether it has a backward at all.
    """

    all: int
    input: int
    after_attention: int
    keeps_input: bool
    keeps_attended: bool
    goes_back: bool = True
    after_block: int = 0
    held: int = 0

    def scaled(self, scale: Callable[[int, int], int], other: KeptByBlock) -> KeptByBlock:
        """For another number of tokens: `scale` is given each size here and in `other`."""
        names = ("all", "input", "after_attention", "after_block", "held")
        return replace(self, **{name: scale(getattr(self, name), getattr(other, name)) for name in names})


@dataclass(frozen=True)
class Kept:
    """Bytes that a forward keeps for its backward: each block's, and those before and after the blocks.

    used_after: of each module outside the blocks that has parameters of its own and is called, by name: how many blocks
    have run when it is called last. Its gradients are there from then on backwards. held: as a block's, when the last
    of those modules is called.
    """

    blocks: tuple[KeptByBlock, ...]
    entrance: int
    exit: int
    used_after: dict[str, int]
    held: int


def measure_kept(decoder: Decoder, attachment: Attachment, tokens: int) -> Kept:
    """What a forward of one document of `tokens` tokens keeps on a CPU, besides parameters, loss and batch.

    The decoder may be on the meta device, and needs no process group.
    """
    few, more = (_measure(decoder, attachment, count) for count in (_FEW, _MORE))

    def scale(at_few: int, at_more: int) -> int:
        """Bytes for `tokens`, on the straight line through those of few tokens and of more."""
        return at_few + (at_more - at_few) * (tokens - _FEW) // (_MORE - _FEW)

    blocks = tuple(one.scaled(scale, other) for one, other in zip(few.blocks, more.blocks, strict=True))
    entrance, exit, held = (scale(getattr(few, n), getattr(more, n)) for n in ("entrance", "exit", "held"))
    return Kept(blocks, entrance, exit, few.used_after, held)


def _measure(decoder: Decoder, attachment: Attachment, tokens: int) -> Kept:
    stand_ins = _stand_ins(decoder, attachment)
    run = _Run(decoder, {tensor.untyped_storage()._cdata for tensor in stand_ins.values()})
    training = decoder.training
    try:
        with without_communication(), run.watched():
            functional_call(run.eval(), {f"decoder.{name}": t for name, t in stand_ins.items()}, (tokens,))
    finally:
        decoder.train(training)
    between = zip(run.blocks, [*run.after, 0], run.held, strict=True)
    blocks = tuple(replace(block, after_block=size, held=held) for block, size, held in between)
    in_blocks = sum(block.all for block in run.kinds.values())
    return Kept(blocks, run.entrance, run.behind - in_blocks - sum(run.after), run.used_after, run.held_last)


def _stand_ins(decoder: Decoder, attachment: Attachment) -> dict[str, Tensor]:
    """Uninitialized parameters and buffers; those of one shape share memory, which nothing writes to.

    Indices of columns and groups are zeros: whatever lay in their memory would point outside a matrix.
    """

    @cache
    def memory(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The tensor of that shape and type."""
        return (torch.zeros if dtype == torch.int32 else torch.empty)(shape, dtype=dtype, device="cpu")

    made = {name: memory(p.shape, p.dtype).detach() for name, p in decoder.named_parameters()}
    for name, tensor in made.items():
        tensor.requires_grad_(name in attachment.trainable)
    return made | {name: memory(b.shape, b.dtype) for name, b in decoder.named_buffers()}


class _Run(nn.Module):
    """A forward of the decoder that runs one of several equal blocks, and counts what it keeps for each of them."""

    def __init__(self, decoder: Decoder, known: set[int]) -> None:
        super().__init__()
        self.decoder, self.known = decoder, known
        self.saved: dict[int, torch.UntypedStorage] = {}  # by address; held, so that no address is used twice
        self.entrance = self.behind = 0  # bytes saved before the blocks, and from the first one on
        self.blocks: list[KeptByBlock] = []
        self.kinds: dict[Any, KeptByBlock] = {}
        self.after: list[int] = []  # bytes saved between one block and the next
        self.used_after: dict[str, int] = {}  # as in `Kept`
        self.held: list[int] = []  # as in `KeptByBlock`, of each block
        self.held_last = 0  # and in the end
        self._seen: list[weakref.ref[Tensor]] = []  # inputs and outputs of blocks
        self._before_blocks: set[int] = set()  # addresses of what several read, such as rotations
        self._in_blocks = False
        self._up_to_attention = self._up_to_block = 0
        self._attended: Tensor | None = None

    def forward(self, tokens: int) -> None:
        """Run zeros as token ids, all of them labelled: how much is kept does not depend on what they are."""
        ids = torch.zeros(tokens, dtype=torch.int64)
        labels, *_ = self.decoder.learned(ids, None, torch.arange(tokens))
        sequences = self.decoder.sequences((tokens,)).with_labels(labels)
        with torch.enable_grad(), saved_tensors_hooks(self._note, lambda tensor: tensor):
            self.decoder(ids, sequences)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside this context each block is measured when it runs."""
        blocks, hooks = [block for _, block in self.decoder.blocks()], []
        for block in blocks:
            block.forward = partial(self._run_block, block, block.forward)
            for attention in (module for module in block.modules() if isinstance(module, Attention)):
                hooks.append(attention.wo.register_forward_pre_hook(self._note_attended))
                hooks.append(attention.register_forward_hook(self._note_end_of_attention))
        inside = {module for block in blocks for module in block.modules()}
        for name, module in self.decoder.named_modules():
            if module not in inside and any(True for _ in module.parameters(recurse=False)):
                hooks.append(module.register_forward_pre_hook(partial(self._note_use, name)))
        try:
            yield
        finally:
            for block in blocks:
                del block.forward
            for hook in hooks:
                hook.remove()

    def _run_block(
        self, block: nn.Module, forward: Callable[..., Tensor], x: Tensor, sequences: Sequences, *rest: Any
    ) -> Tensor:
        parameters = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())
        self._in_blocks = True
        shared = sequences.positions, sequences.rotations, *(sequences.alibi or ()), *chain(*sequences.prefixes)
        self._before_blocks.update(map(_address, shared))
        self.after += [self.behind - self._up_to_block] if self.blocks else []
        self._up_to_block = self.behind
        added = any(getattr(module, "addition", None) is not None for module in block.modules())
        kind = type(block), parameters, added, x.requires_grad, torch.is_grad_enabled()
        self._seen.append(weakref.ref(x))
        self.held.append(self._held_now())
        if kind in self.kinds:
            self.blocks.append(self.kinds[kind])
            return self._noted(x.clone())  # another tensor, with a gradient where x has one
        before = self._up_to_attention = self.behind
        y = forward(x, sequences, *rest)
        self._up_to_block = self.behind
        self.kinds[kind] = KeptByBlock(
            all=self.behind - before,
            input=x.nbytes if torch.is_grad_enabled() else 0,
            after_attention=self.behind - self._up_to_attention,
            keeps_input=_address(x) in self.saved,
            keeps_attended=self._attended is not None and _address(self._attended) in self.saved,
            goes_back=y.requires_grad,
        )
        self.blocks.append(self.kinds[kind])
        return self._noted(y)

    def _noted(self, y: Tensor) -> Tensor:
        self._seen.append(weakref.ref(y))
        return y

    def _held_now(self) -> int:
        alive = (tensor for reference in self._seen if (tensor := reference()) is not None)
        storages = {_address(tensor): tensor.untyped_storage().nbytes() for tensor in alive}
        return sum(size for address, size in storages.items() if address not in self.saved)

    def _note(self, tensor: Tensor) -> Tensor:
        address = _address(tensor)
        if address not in self.known and address not in self.saved:
            storage = self.saved[address] = tensor.untyped_storage()
            size = storage.nbytes()
            if not self._in_blocks or address in self._before_blocks:
                self.entrance += size
            else:
                self.behind += size
        return tensor

    def _note_use(self, name: str, *_given: Any) -> None:
        self.used_after[name], self.held_last = len(self.blocks), self._held_now()

    def _note_attended(self, _wo: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._attended = inputs[0]

    def _note_end_of_attention(self, *_given: Any) -> None:
        self._up_to_attention = self.behind


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
