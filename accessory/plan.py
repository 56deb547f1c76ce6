"""The memory plan of a rank: bytes of everything that lives at the worst moment of a training step, without weights.

Parameters are counted on the model itself, made on the meta device; activations by what each block keeps for its
backward (see `block_activation_bytes`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from accessory.checkpoint.load import targets
from accessory.method import Attachment
from accessory.model.decoder import Decoder
from accessory.model.linear import Linear
from accessory.model.loss import CHUNK
from accessory.parallel.groups import Layout
from accessory.quant import PackedWeight


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank. `activations` is what the forward keeps, `logits` one loss chunk, `buffers` one unpacked matrix."""

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
    share = layout.dp_size
    weights = trainable = 0
    for name, parameter in decoder.named_parameters():
        size = parameter.numel() * parameter.element_size()
        if name in attachment.trainable:
            trainable += size
        else:
            weights += size // share if data_parallel == "fsdp" else size
    width = torch.finfo(decoder.dtype).bits // 8
    block = block_activation_bytes(decoder, attachment, tokens)
    kept_input = tokens * decoder.args.dim * width
    layers = len(decoder.layers)
    # Embedding output and head gradient are [T, D] each, beside what the blocks keep.
    activations = (layers * kept_input + block if checkpointing else layers * block) + 2 * kept_input
    rows = min(tokens, CHUNK)
    vocabulary = decoder.head_weight.shape[0]
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
        trainable=trainable // share,
        gradients=trainable,  # whole until they are reduced, whatever the optimizer keeps of them
        optimizer=2 * trainable // share,
        activations=activations,
        logits=rows * vocabulary * (4 + width),
        buffers=largest * width,
    )


def block_activation_bytes(decoder: Decoder, attachment: Attachment, tokens: int) -> int:
    """Bytes one block keeps for its backward, for `tokens` tokens, on this rank.

    Always: the inputs of both norms (D each) with a 4-byte scale a token, rotated q and attention's output (this rank's
    heads), k and v, a 4-byte log-sum a head, and gate and up (F each). A linear with LoRA or a trained weight keeps its
    input too; q, k, v share one, gate and up another.
    """
    args, ranks = decoder.args, decoder.ranks
    width = torch.finfo(decoder.dtype).bits // 8
    heads, kv_width = args.n_heads // ranks, args.n_kv_heads * args.head_dim // ranks
    q_width, f_width = heads * args.head_dim, args.hidden_dim // ranks
    per_token = width * (2 * args.dim + 2 * q_width + 2 * kv_width + 2 * f_width) + 4 * (2 + heads)
    for inputs, size in (
        (("wq", "wk", "wv"), args.dim),
        (("wo",), q_width),
        (("w1", "w3"), args.dim),
        (("w2",), f_width),
    ):
        keeping = [name for name in inputs if _keeps_input(name, attachment)]
        if keeping:
            per_token += width * size
    per_token += sum(width * args_rank for args_rank in _lora_ranks(decoder))
    return per_token * tokens


def _keeps_input(linear: str, attachment: Attachment) -> bool:
    return any(
        name.startswith("layers.0.") and (f".{linear}.lora_a." in name or name.endswith(f".{linear}.weight"))
        for name in attachment.trainable
    )


def _lora_ranks(decoder: Decoder) -> list[int]:
    linears = [m for m in decoder.layers[0].modules() if isinstance(m, Linear)]
    return [m.lora_a.weight.shape[0] for m in linears if hasattr(m, "lora_a")]


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
