"""The memory plan of a rank: the bytes alive at the peak of a training step, known before weights are read.

Parameters are counted on the model, which is on the meta device; what a forward keeps for its backward is measured
(`accessory.memory.kept`). Formulas count what is alive only for a moment: a block's own work (`block_work`), kernels'
workspaces, gradients, logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch
from torch import nn

from accessory.checkpoint.load import targets
from accessory.memory.block_work import BlockWork, normalizing_bytes
from accessory.memory.kept import measure_kept
from accessory.memory.teacher import TeacherMemory
from accessory.memory.unpacking import may_unpack_ahead
from accessory.memory.vision import VisionMemory
from accessory.method import Attachment
from accessory.model.decoder import Decoder
from accessory.model.linear import Linear
from accessory.model.lora_factors import factor_bytes
from accessory.model.loss import chunk_bytes, chunk_rows
from accessory.optim import state_bytes
from accessory.parallel.groups import Layout
from accessory.quant import PackedWeight
from accessory.quant.moves import BYTES, PIECE
from accessory.quant.moving_groups import MovingIntegers
from accessory.quant.products import memory_to_multiply
from accessory.vision import Vision

OCCASIONAL = ("teacher", "encoder", "images", "projection")
"""Parts of a plan that most runs do not have."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank.

    Documents count whole, though a batch keeps less of those that share a beginning (see `PackedBatch`).
    activations: kept by the forward, and by the block that is recomputed. logits: of a loss chunk. buffers: for
    unpacked matrices (two, where a run may unpack ahead), and workspaces of their kernels. working: the peak of
    activations, logits, gradients and a block's backward together. teacher: its weights, apart from those that are the
    student's, too. encoder: weights of what sees images. images: what it works in, and `projection` what is kept behind
    it, both in `working`, too.
    """

    weights: int
    trainable: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    working: int
    teacher: int = 0
    encoder: int = 0
    images: int = 0
    projection: int = 0

    @property
    def total(self) -> int:
        """What the rank needs: everything permanent, and the peak of the rest."""
        permanent = self.weights + self.teacher + self.encoder + self.trainable + self.optimizer
        return permanent + self.buffers + self.working

    def parts(self) -> list[str]:
        """Names of the parts; those that not every run has only where they are."""
        return [field.name for field in fields(self) if field.name not in OCCASIONAL or getattr(self, field.name)]

    def table(self, title: str, available: int | None) -> str:
        """Printable lines; available: bytes the device has."""
        lines = [f"memory plan per rank: {title}"]
        for field in self.parts():
            lines.append(f"  {field:<12} {getattr(self, field) / 1e9:9.3f} GB")
        room = f" of {available / 1e9:.1f} GB" if available else ""
        lines.append(f"  {'total':<12} {self.total / 1e9:9.3f} GB{room}")
        return "\n".join(lines)


class StepMemory:
    """The memory of a step with micro-batches of `tokens` supervised tokens; the decoder may be on the meta device.

    longest: tokens of the longest document; by default there is one. micro_batches: of a step. optim: as `--optim`.
    offload: whether inputs of recomputed blocks are moved to host memory. teacher: a decoder that teaches, and names of
    its parameters that are this one's, too. seen: what sees images, and how many a micro-batch has at most.
    """

    def __init__(
        self,
        decoder: Decoder,
        attachment: Attachment,
        layout: Layout,
        *,
        tokens: int,
        data_parallel: str,
        longest: int | None = None,
        micro_batches: int = 1,
        optim: str = "adamw",
        offload: bool = False,
        teacher: tuple[Decoder, Set[str]] | None = None,
        seen: tuple[Vision, int] | None = None,
    ) -> None:
        self.decoder, self.layout, self.tokens, self.data_parallel = decoder, layout, tokens, data_parallel
        self.longest, self.optim, self.offload = min(longest or tokens, tokens), optim, offload
        self.trained = {name: p for name, p in decoder.named_parameters() if name in attachment.trainable}
        self.trainable, self.frozen = _nbytes(self.trained), _nbytes(dict(decoder.named_parameters()))
        self.seen = VisionMemory(decoder, seen[0], attachment, layout, seen[1]) if seen else None
        self.frozen -= self.trainable + (self.seen.weights if self.seen else 0)
        self.blocks = dict(decoder.blocks())
        self.gradients = [self._trained_below(f"{name}.") for name in self.blocks]
        self.held = self.trainable if micro_batches > 1 else 0  # gradients of earlier micro-batches
        moving = [module for module in decoder.modules() if isinstance(module, MovingIntegers) and module.wish]
        self.sketches = sum(module.basis.nbytes for module in moving)
        self.looked_at = min(max((module.shape.numel() for module in moving), default=0), PIECE) * BYTES
        self.width = decoder.dtype.itemsize  # bytes of an activation
        head = ("tok_embeddings" if decoder.output is None else "output") + ".weight"
        self.trained_head = self.trained[head].numel() if head in self.trained else 0
        kept = measure_kept(decoder, attachment, tokens)
        rest = (tokens % self.longest,) if tokens % self.longest else ()
        lengths = (self.longest,) * (tokens // self.longest) + rest
        self.teacher = TeacherMemory(teacher[0], layout, lengths, data_parallel, teacher[1]) if teacher else None
        self.taught = self.teacher.hidden if self.teacher else 0  # alive until the loss
        self.work = [BlockWork(block, lengths, decoder.dtype, layout.device) for block in self.blocks.values()]
        measured = zip(self.work, kept.blocks, strict=True)
        self.kept = replace(kept, blocks=tuple(work.kept(block) for work, block in measured))

    def plan(self, checkpointing: int) -> MemoryPlan:
        """The plan where the first `checkpointing` blocks are recomputed.

        The peak is one of eight moments: in the forward of a block that has no backward, what earlier ones keep and its
        own work; in the final norm, everything kept and its work; at the loss, everything kept and a chunk's logits; in
        a block's backward, what it and earlier blocks keep, gradients of what comes later and its own work; in the
        embedding's backward, all gradients and its own work; in the optimizer's step, or where integers move, all
        gradients and its workspace; in a teacher, and then in what sees images, before all these, their own work. What
        the teacher gives stays until the loss.
        Sketches of new bases are there in all of them. Gradients of earlier micro-batches are there throughout; later
        ones are added to them as they are made.
        """
        layout, trainable, blocks = self.layout, self.trainable, self.blocks.values()
        share, sharded = layout.dp_size, layout.dp_size > 1
        weights = self.frozen
        gathered = trainable if sharded else 0  # the trained part is gathered on every rank while it is used
        if sharded and self.data_parallel == "fsdp":
            # One block is gathered at a time, and the next one meanwhile; what lies outside the blocks for good.
            sizes = (_nbytes(dict(block.named_parameters())) for block in blocks)
            weights = weights // share + 2 * max(a - b for a, b in zip(sizes, self.gradients, strict=True))
            gathered = 2 * max(self.gradients) + trainable - sum(self.gradients)
        logits = self._logits()
        moments = [
            self.held + self._in_teacher(),
            self.held + self._in_encoder(),
            self.held + self._at_norm(checkpointing),
            self.held + logits + self._at_loss(checkpointing),
            self._in_blocks(checkpointing),
            trainable + self._at_embedding(),
            trainable + max(self._in_optimizer(), self.looked_at),
        ]
        return MemoryPlan(
            weights=weights,
            trainable=trainable // share + gathered,
            gradients=trainable,  # whole until they are reduced, whatever the optimizer keeps of them
            optimizer=state_bytes(self.optim, self.trained) // share,
            activations=self._activations(checkpointing, again=checkpointing == len(blocks)),
            logits=logits,
            buffers=self._buffers(),
            working=max(moments) + self.sketches,
            teacher=self.teacher.weights if self.teacher else 0,
            encoder=self.seen.weights if self.seen else 0,
            images=self.seen.working if self.seen else 0,
            projection=self.seen.kept if self.seen else 0,
        )

    def _in_teacher(self) -> int:
        return self.teacher.forward if self.teacher else 0

    def _in_encoder(self) -> int:
        """What is alive while images are encoded, before the blocks: that, and what a teacher gave."""
        return self.seen.working + self.taught if self.seen else 0

    def _activations(self, recomputed: int, *, again: bool) -> int:
        """Everything that the forward keeps; `again`: and what the last block keeps when it is recomputed.

        If some blocks are not recomputed, those are freed before that.
        """
        hidden = self.tokens * self.decoder.args.embedding_dim * self.width  # gradient of the hidden states
        kept = self._by_blocks(len(self.kept.blocks), recomputed, again=again)
        return kept + self._beside_blocks() + self.kept.exit + hidden

    def _by_blocks(self, blocks: int, recomputed: int, *, again: bool) -> int:
        """What the first `blocks` blocks keep, `recomputed` of them only their input; `again`: the last is recomputed.

        Three of the inputs that are offloaded are on the device at a time.
        """
        kept = self.kept.blocks[:blocks]
        inputs = [block.input for block in kept[:recomputed]]
        total = sum(inputs[:3] if self.offload else inputs) + sum(block.all for block in kept[recomputed:])
        total += sum(block.after_block for block in kept[:-1])
        return total + (kept[-1].all - kept[-1].keeps_input * kept[-1].input if again else 0)

    def _beside_blocks(self) -> int:
        """What is kept before the blocks, the loss's row numbers, a trained head's gradient (made in the forward)."""
        return self.kept.entrance + 8 * self.tokens + self.trained_head * 4 + (self.seen.kept if self.seen else 0)

    def _at_norm(self, recomputed: int) -> int:
        """What is alive in the final norm: all that is kept by then, and what it makes."""
        if self.decoder.norm is None:
            return 0
        kept = self._by_blocks(len(self.kept.blocks), recomputed, again=False) + self._beside_blocks()
        made = normalizing_bytes(self.decoder.norm, self.tokens, self.decoder.dtype, self.layout.device)
        return kept + self.kept.exit + self.kept.held + made + self.taught

    def _at_loss(self, recomputed: int) -> int:
        """What is alive beside a chunk's logits: all kept, hidden states and two chunks of them, a head's gradient."""
        hidden = (
            self.width
            * self.decoder.args.embedding_dim
            * (self.tokens + 2 * min(self.tokens, chunk_rows(self.layout.device)))
        )
        taught = self.taught + (self.teacher.chunk if self.teacher else 0)
        return self._activations(recomputed, again=False) + hidden + self.trained_head * (self.width + 4) + taught

    def _logits(self) -> int:
        """Logits of a chunk, and a copy of the head if it is cast (an fp32 master), which happens once and whole."""
        head = self.decoder.head_weight
        copy = head.numel() * self.width if head.dtype != self.decoder.dtype else 0
        taught = self.teacher is not None
        return copy + chunk_bytes(self.tokens, len(head), self.layout.device, self.decoder.dtype, taught)

    def _in_blocks(self, recomputed: int) -> int:
        """The peak of the blocks' backward, or of the forward of those that have none.

        If there are gradients of earlier micro-batches, new ones are added to them as each autograd function ends.
        """
        beside, made, blocks = self._beside_blocks() + self.held, self._gradients_from_block(), self.kept.blocks
        most_at_once = 0
        if self.held:
            most_at_once, made = self._most_gradients_at_once(), [0] * len(blocks)
            if self.decoder.output is not None:  # else the head's gradient is added when the embedding's is there too
                beside -= 4 * self.trained_head
        moments = []
        for i, (block, work) in enumerate(zip(blocks, self.work, strict=True)):
            again = block.goes_back and i < recomputed
            forward = work.forward(block) + self.taught
            moment = work.backward(block) + made[i] + most_at_once if block.goes_back else forward
            moments.append(self._by_blocks(i + 1, min(recomputed, i + 1), again=again) + moment)
        return beside + max(moments) + self._of_packed_gradients()

    def _gradients_from_block(self) -> list[int]:
        """Gradients that are there in each block's backward: its own, and those of all that runs after it."""
        made = list(self.gradients)
        for name, place in self.kept.used_after.items():
            if place:
                made[place - 1] += self._trained_of(name)
        return list(accumulate(reversed(made)))[::-1]

    def _of_packed_gradients(self) -> int:
        """Memory in which gradients of packed matrices' trained parts are made."""
        packed = ((name, module) for name, module in self.decoder.named_modules() if isinstance(module, PackedWeight))
        trained = (m for name, m in packed if any(f"{name}.{part}" in self.trained for part in m.trained))
        return max((matrix.gradients_bytes(self.decoder.dtype) for matrix in trained), default=0)

    def _trained_below(self, *prefixes: str) -> int:
        """Bytes of trained parameters whose names begin so, and of their gradients."""
        return _nbytes({name: p for name, p in self.trained.items() if name.startswith(prefixes)})

    def _most_gradients_at_once(self) -> int:
        """Bytes of the gradients that one autograd function makes: those of linears that share an input."""
        names = {module: f"{name}." for name, module in self.decoder.named_modules()}
        in_blocks = [self._trained_below(*(names[linear] for linear in found)) for found, _ in self._linears_by_input()]
        return max(in_blocks + [self._trained_of(name) for name, place in self.kept.used_after.items() if place])

    def _trained_of(self, module: str) -> int:
        """Bytes of a module's own trained parameters."""
        return _nbytes({name: p for name, p in self.trained.items() if name.rpartition(".")[0] == module})

    def _linears_by_input(self) -> Iterator[tuple[list[Linear], bool]]:
        """Linears that share an input, and whether their block has a backward."""
        for block, kept in zip(self.blocks.values(), self.kept.blocks, strict=True):
            for linears in (*block.attention.linears_by_input(), *block.feed_forward.linears_by_input()):
                yield linears, kept.goes_back

    def _at_embedding(self) -> int:
        """Bytes beside all gradients while a trained embedding's is made: its rows' gradients twice, and terms to add.

        There is one term if the head is tied to it, and one if earlier micro-batches left gradients.
        """
        weight = self.decoder.tok_embeddings.weight
        if "tok_embeddings.weight" not in self.trained:
            return 0
        parts = (self.decoder.output is None) + (self.held > 0)
        return weight.element_size() * (parts * weight.numel() + 2 * self.tokens * self.decoder.args.embedding_dim)

    def _in_optimizer(self) -> int:
        """The step's workspace: bitsandbytes' fp32 copies of a parameter on a CPU, 5 with 8-bit moments, else 3."""
        if self.layout.device.type != "cpu" or self.optim != "adamw8bit":
            return 0
        narrow = {name: state_bytes(self.optim, {name: p}) < 8 * p.numel() for name, p in self.trained.items()}
        return max(4 * p.numel() * (5 if narrow[name] else 3) for name, p in self.trained.items())

    def _buffers(self) -> int:
        """Workspaces of kernels for packed matrices, the buffers that others are unpacked into, LoRA's cast factors."""
        dtype, device = self.decoder.dtype, self.layout.device
        found = []
        for linears, backward in self._linears_by_input():
            weights, ranks = [m.weight for m in linears], [_rank(m) for m in linears]
            found.append(memory_to_multiply(weights, ranks, self.tokens, dtype, device, backward=backward))
        found += [(other.workspace, other.buffer) for other in (self.teacher, self.seen) if other]
        lora = (p.numel() for name, p in self.trained.items() if ".lora_" in name)
        factors = factor_bytes(sum(lora), dtype, device)
        whole = self.layout.dp_size == 1  # else trained parameters are sharded, and nothing is unpacked ahead
        buffers = 2 if whole and may_unpack_ahead(self.decoder, device) else 1
        return max(workspace for workspace, _ in found) + buffers * max(buffer for _, buffer in found) + factors


def _rank(linear: Linear) -> int:
    return 0 if linear.lora_a is None else len(linear.lora_a.weight)


def _nbytes(parameters: dict[str, nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters.values())


def parameter_counts(decoder: Decoder, attachment: Attachment) -> tuple[int, int]:
    """(trained, all) parameters of the whole model, over all model-parallel ranks; of a packed matrix, its weights."""
    trained = total = 0
    for target in targets(decoder):
        count = torch.Size(target.whole_shape(decoder.ranks)).numel()
        total += 0 if isinstance(target.owner, PackedWeight) else count
        trained += count if target.name in attachment.trainable else 0
    return trained, total


def device_memory(device: torch.device) -> int:
    """Bytes the device has in all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    with open("/proc/meminfo", encoding="utf-8") as file:
        return int(file.readline().split()[1]) * 1024
