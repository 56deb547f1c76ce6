"""The memory of a teacher on a rank: what it holds for good, and what it takes while it runs, before the student."""

from __future__ import annotations

from collections.abc import Set
from itertools import chain

from accessory.memory.block_work import BlockWork, normalizing_bytes
from accessory.memory.kept import measure_kept
from accessory.method import Attachment
from accessory.model.decoder import Decoder
from accessory.model.loss import chunk_rows
from accessory.parallel.groups import Layout
from accessory.quant.products import memory_to_multiply


class TeacherMemory:
    """Bytes for micro-batches of `tokens` tokens in documents of `lengths`; the decoder may be on the meta device.

    shared: names of parameters that are the student's, too. weights: all others, for good. hidden: its last states,
    which stay until the loss, and `chunk` those of a chunk. forward: the peak while it runs. workspace, buffer: as of
    `memory_to_multiply`, the most of any product.
    """

    def __init__(
        self, decoder: Decoder, layout: Layout, lengths: tuple[int, ...], data_parallel: str, shared: Set[str]
    ) -> None:
        tokens, dtype, device = sum(lengths), decoder.dtype, layout.device
        self.weights = _weights(decoder, layout, data_parallel, shared)
        width = decoder.args.embedding_dim * dtype.itemsize
        self.hidden, self.chunk = tokens * width, min(tokens, chunk_rows(device)) * width
        kept, blocks = measure_kept(decoder, Attachment(), tokens), [block for _, block in decoder.blocks()]
        pairs = zip(blocks, kept.blocks, strict=True)
        work = (BlockWork(block, lengths, dtype, device).forward(measured) for block, measured in pairs)
        norm = 0 if decoder.norm is None else kept.held + normalizing_bytes(decoder.norm, tokens, dtype, device)
        self.forward = max(*work, norm)
        linears = [[*b.attention.linears_by_input(), *b.feed_forward.linears_by_input()] for b in blocks]
        found = [
            memory_to_multiply(
                [linear.weight for linear in group],
                [0 if linear.lora_a is None else len(linear.lora_a.weight) for linear in group],
                tokens, dtype, device, backward=False,
            )
            for group in chain(*linears)
        ]  # fmt: skip
        self.workspace, self.buffer = (max(each) for each in zip(*found, strict=True))


def _weights(decoder: Decoder, layout: Layout, data_parallel: str, shared: Set[str]) -> int:
    """Bytes of its own parameters; under fsdp, of a share of the blocks and of two blocks that are gathered."""
    sizes = {name: p.nbytes for name, p in decoder.named_parameters() if name not in shared}
    total = sum(sizes.values())
    if data_parallel != "fsdp" or layout.dp_size == 1:
        return total
    blocks = [sum(size for n, size in sizes.items() if n.startswith(f"{name}.")) for name, _ in decoder.blocks()]
    return total - sum(blocks) + sum(blocks) // layout.dp_size + 2 * max(blocks)
