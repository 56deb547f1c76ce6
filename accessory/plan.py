"""The memory plan of a rank: bytes of everything that lives at the worst moment of a training step, without weights.

Parameters are counted on the model itself, made on the meta device; activations by what each block keeps for its
backward (see `activation_bytes`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import nn

from accessory.checkpoint.load import targets
from accessory.method import Attachment
from accessory.model.decoder import Decoder
from accessory.model.linear import Linear
from accessory.model.loss import CHUNK
from accessory.parallel.groups import Layout
from accessory.quant import PackedWeight

CPU = torch.device("cpu")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank. `activations`: kept by the forward; `logits`: a loss chunk; `buffers`: an unpacked matrix."""

    weights: int
    trainable: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int

    @property
    def total(self) -> int:
        """All of it together."""
        return sum(getattr(self, field.name) for field in fields(self))

    def table(self, title: str, available: int | None) -> str:
        """Lines for a person, against what the device has."""
        lines = [f"memory plan per rank: {title}"]
        for field in fields(self):
            lines.append(f"  {field.name:<12} {getattr(self, field.name) / 1e9:9.3f} GB")
        room = f" of {available / 1e9:.1f} GB" if available else ""
        lines.append(f"  {'total':<12} {self.total / 1e9:9.3f} GB{room}")
        return "\n".join(lines)


def memory_plan(
    decoder: Decoder, attachment: Attachment, layout: Layout, *, tokens: int, checkpointing: bool, data_parallel: str
) -> MemoryPlan:
    """Plan for a micro-batch of `tokens`, all supervised, on a decoder that need not be filled."""
    share, sharded = layout.dp_size, layout.dp_size > 1
    trainable = _bytes(decoder, attachment, trained=True)
    weights = _bytes(decoder, attachment, trained=False)
    gathered = trainable if sharded else 0  # what is trained is put together on every rank while it is used
    if sharded and data_parallel == "fsdp":
        # A block at a time is put together, and the next one on its way.
        weights = weights // share + 2 * _bytes(decoder.layers[0], attachment, trained=False, prefix="layers.0.")
        gathered = 2 * trainable // len(decoder.layers)
    width = torch.finfo(decoder.dtype).bits // 8
    head = decoder.head_weight
    # A wider head (an fp32 master) is cast whole for the products with it.
    head_copy = head.numel() * width if head.dtype != decoder.dtype else 0
    largest = max(
        [
            m.weight.shape.numel()
            for m in decoder.modules()
            if isinstance(m, Linear) and isinstance(m.weight, PackedWeight)
        ],
        default=0,
    )
    return MemoryPlan(
        weights=weights,
        trainable=trainable // share + gathered,
        gradients=trainable,  # whole until they are reduced, whatever the optimizer keeps of them
        optimizer=2 * trainable // share,
        activations=activation_bytes(decoder, attachment, tokens, checkpointing=checkpointing, device=layout.device),
        logits=min(tokens, CHUNK) * len(head) * (4 + width) + head_copy,
        buffers=largest * width,
    )


def _bytes(module: nn.Module, attachment: Attachment, *, trained: bool, prefix: str = "") -> int:
    return sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in module.named_parameters()
        if (prefix + name in attachment.trainable) == trained
    )


def activation_bytes(
    decoder: Decoder, attachment: Attachment, tokens: int, *, checkpointing: bool, device: torch.device = CPU
) -> int:
    """Bytes the forward of `tokens` supervised tokens keeps for the backward, on this rank, parameters aside.

    With checkpointing: every block's input, and what the one block being run again keeps. Without: what every block
    keeps; the first norm keeps nothing where neither it nor the embedding below it is trained. On top of either the
    final norm, the loss's gradient and row numbers, the shared rotations, and what training the embedding and the head
    takes.
    """
    args, layers = decoder.args, len(decoder.layers)
    x = tokens * args.dim * torch.finfo(decoder.dtype).bits // 8
    norm = x + 4 * tokens
    kept = block_activation_bytes(decoder, attachment, tokens, device)
    trains_embedding = "tok_embeddings.weight" in attachment.trainable
    if checkpointing:
        kept += (layers - 1) * x
    else:
        first_is_needed = trains_embedding or "layers.0.attention_norm.weight" in attachment.trainable
        kept = layers * kept - (0 if first_is_needed else norm)
    kept += norm + x + tokens * (8 + 4 * args.head_dim)
    if trains_embedding:
        kept += 9 * tokens  # row numbers, and which of them are other ranks'
    if ("tok_embeddings" if decoder.output is None else "output") + ".weight" in attachment.trainable:
        kept += 4 * decoder.head_weight.numel()  # the head's gradient is made in the forward
    return kept


def block_activation_bytes(decoder: Decoder, attachment: Attachment, tokens: int, device: torch.device = CPU) -> int:
    """Bytes one block keeps for its backward, for `tokens` tokens, on this rank.

    Always: the inputs of both norms (D each) with a 4-byte scale a token, rotated q and attention's output (this rank's
    heads), k and v (repeated for every query head on CUDA), a 4-byte log-sum a head, and gate and up (F each). Linears
    with LoRA or a trained weight keep their input too: wq, wk, wv share one, w1 and w3 another, and wo's is kept
    already. LoRA adds R a linear; its dropout a thinned input a linear, with a mask of bytes (on the CPU, of numbers).
    """
    args, ranks = decoder.args, decoder.ranks
    width = torch.finfo(decoder.dtype).bits // 8
    heads, kv_heads = args.n_heads // ranks, args.n_kv_heads // ranks
    if device.type == "cuda":
        kv_heads = heads
    q_width, kv_width, f_width = heads * args.head_dim, kv_heads * args.head_dim, args.hidden_dim // ranks
    per_token = width * (2 * args.dim + 2 * q_width + 2 * kv_width + 2 * f_width) + 4 * (2 + heads)
    for linears, size in ((("wq", "wk", "wv"), args.dim), (("w1", "w3"), args.dim), (("w2",), f_width)):
        if any(_keeps_input(name, decoder, attachment) for name in linears):
            per_token += width * size
    mask = 1 if device.type == "cuda" else width
    for linear in _lora_linears(decoder):
        per_token += width * linear.lora_a.weight.shape[0]
        if linear.addition.dropout:
            per_token += (width + mask) * linear.lora_a.weight.shape[1]
    return per_token * tokens


def _keeps_input(name: str, decoder: Decoder, attachment: Attachment) -> bool:
    """Whether the linears called `name` keep the input they were given (LoRA's dropout keeps a thinned one instead)."""
    linear = next(m for n, m in decoder.layers[0].named_modules() if n.endswith(f".{name}"))
    trained = any(n.startswith("layers.0.") and n.endswith(f".{name}.weight") for n in attachment.trainable)
    return trained or (linear in _lora_linears(decoder) and not linear.addition.dropout)


def _lora_linears(decoder: Decoder) -> list[Linear]:
    return [m for m in decoder.layers[0].modules() if isinstance(m, Linear) and hasattr(m, "lora_a")]


def parameter_counts(decoder: Decoder, attachment: Attachment) -> tuple[int, int]:
    """(trained, all) parameters of the whole model, over all model-parallel ranks."""
    trained = total = 0
    for target in targets(decoder):
        count = torch.Size(target.whole_shape(decoder.ranks)).numel()
        total += count
        trained += count if target.name in attachment.trainable else 0
    return trained, total


def device_memory(device: torch.device) -> int | None:
    """Bytes the device has in all; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    with open("/proc/meminfo", encoding="utf-8") as file:
        return int(file.readline().split()[1]) * 1024
