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
from accessory.model.document_attention import backward_bytes
from accessory.model.linear import Linear
from accessory.model.loss import CHUNK, chunk_bytes
from accessory.model.packed_attention import attends, packed_backward_bytes
from accessory.model.position import LEAN_WIDTH
from accessory.optim import state_bytes
from accessory.parallel.groups import Layout
from accessory.quant.products import memory_to_multiply

CPU = torch.device("cpu")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank.

    Every document counts as a whole, though a batch keeps less of those that begin alike (see `PackedBatch`).
    activations: kept by the forward, and by the block being run again. logits: a loss chunk. buffers: what matrices are
    unpacked into, and kernels of them work in. working: of activations, logits, gradients and a block's backward, what
    is alive together when it is most.
    """

    weights: int
    trainable: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    working: int

    @property
    def total(self) -> int:
        """What the rank needs: all that stays, and the worst moment of what comes and goes."""
        return self.weights + self.trainable + self.optimizer + self.buffers + self.working

    def table(self, title: str, available: int | None) -> str:
        """Lines for a person, against what the device has."""
        lines = [f"memory plan per rank: {title}"]
        for field in fields(self):
            lines.append(f"  {field.name:<12} {getattr(self, field.name) / 1e9:9.3f} GB")
        room = f" of {available / 1e9:.1f} GB" if available else ""
        lines.append(f"  {'total':<12} {self.total / 1e9:9.3f} GB{room}")
        return "\n".join(lines)


def memory_plan(
    decoder: Decoder,
    attachment: Attachment,
    layout: Layout,
    *,
    tokens: int,
    checkpointing: int,
    data_parallel: str,
    longest: int | None = None,
    micro_batches: int = 1,
    optim: str = "adamw",
    offload: bool = False,
) -> MemoryPlan:
    """Plan for micro-batches of `tokens`, all supervised, on a decoder that need not be filled.

    checkpointing: how many blocks are recomputed, the first ones; offload: whether their inputs wait in host memory.
    longest: tokens of the longest document; absent: all are one. micro_batches: of a step. optim: as `--optim`.

    The worst is one of four moments. At the end of the forward, all that is kept beside a chunk's logits; in a block's
    backward, what the blocks up to it keep, the gradients of those behind it and its own work; in the embedding's, all
    gradients and what made the last; in the optimizer's step, all gradients and its workspace. Gradients of earlier
    micro-batches are there throughout, and take up those of later ones as they are made.
    """
    share, sharded = layout.dp_size, layout.dp_size > 1
    trainable = _bytes(decoder, attachment, trained=True)
    weights = _bytes(decoder, attachment, trained=False)
    gathered = trainable if sharded else 0  # what is trained is put together on every rank while it is used
    if sharded and data_parallel == "fsdp":
        # A block at a time is put together, and the next one on its way.
        weights = weights // share + 2 * _bytes(decoder.layers[0], attachment, trained=False, prefix="layers.0.")
        gathered = 2 * trainable // len(decoder.layers)
    width, head = torch.finfo(decoder.dtype).bits // 8, decoder.head_weight
    # A wider head (an fp32 master) is cast whole for the products with it.
    head_copy = head.numel() * width if head.dtype != decoder.dtype else 0
    logits = chunk_bytes(tokens, len(head), layout.device, decoder.dtype) + head_copy
    trained = {name: p for name, p in decoder.named_parameters() if name in attachment.trainable}
    step = {"checkpointing": checkpointing, "device": layout.device, "offload": offload}
    held = trainable if micro_batches > 1 else 0
    moments = [
        held + logits + _bytes_at_loss(decoder, attachment, tokens, **step),
        _bytes_in_blocks(decoder, attachment, tokens, min(longest or tokens, tokens), held=held, **step),
        trainable + _bytes_at_embedding(decoder, attachment, tokens, waiting=held > 0),
        trainable + _optimizer_workspace(optim, trained, layout.device),
    ]
    return MemoryPlan(
        weights=weights,
        trainable=trainable // share + gathered,
        gradients=trainable,  # whole until they are reduced, whatever the optimizer keeps of them
        optimizer=state_bytes(optim, trained) // share,
        activations=activation_bytes(decoder, attachment, tokens, **step),
        logits=logits,
        buffers=_buffers(decoder, tokens, layout.device),
        working=max(moments),
    )


def _bytes_at_loss(decoder: Decoder, attachment: Attachment, tokens: int, *, checkpointing: int, **step) -> int:
    """What is alive beside a chunk's logits: what is kept, hidden states, two chunks of them, and a head's gradient."""
    layers, width = len(decoder.layers), torch.finfo(decoder.dtype).bits // 8
    kept = _kept_by_blocks(decoder, attachment, tokens, layers, recomputed=checkpointing, **step)
    kept += _kept_beside_blocks(decoder, attachment, tokens) + _exit_bytes(decoder, attachment, tokens)
    hidden = width * decoder.args.embedding_dim * (tokens + 2 * min(tokens, CHUNK))
    return kept + hidden + _trains_head(decoder, attachment) * (width + 4) * decoder.head_weight.numel()


def _bytes_in_blocks(
    decoder: Decoder, attachment: Attachment, tokens: int, longest: int, *, held: int, checkpointing: int, **step
) -> int:
    """The worst moment of the blocks' backward: what is kept up to a block, gradients behind it, and its own work.

    held: gradients of earlier micro-batches, to which a function's are added as soon as they are made.
    """
    layers, beside = len(decoder.layers), _kept_beside_blocks(decoder, attachment, tokens)
    gradient = _bytes(decoder.layers[0], attachment, trained=True, prefix="layers.0.")
    if held:
        beside += held + _most_gradients_at_once(decoder, attachment)
        gradient = 0
        if decoder.output is not None:  # else the head's gradient is added when the embedding's is there too
            beside -= _trains_head(decoder, attachment) * 4 * decoder.head_weight.numel()
    work = max(
        _feed_forward_backward_bytes(decoder, tokens),
        _attention_backward_bytes(decoder, tokens, longest, step["device"]) - _feed_forward_keeps(decoder, tokens),
    )
    at = []
    # Between these blocks it grows or shrinks evenly; 2 is where inputs that are offloaded stop to add up.
    for i in {0, 2, checkpointing - 1, checkpointing, layers - 1} & set(range(layers)):
        options = {"recomputed": min(checkpointing, i + 1), "again": i < checkpointing, **step}
        at.append(_kept_by_blocks(decoder, attachment, tokens, i + 1, **options) + (layers - i) * gradient)
    return beside + max(at) + work


def _most_gradients_at_once(decoder: Decoder, attachment: Attachment) -> int:
    """Those that one function makes: of w1 and w3 together, which are the largest that share an input."""
    linears = decoder.layers[0].feed_forward.named_children()
    return sum(
        _bytes(linear, attachment, trained=True, prefix=f"layers.0.feed_forward.{name}.")
        for name, linear in linears
        if name in ("w1", "w3")
    )


def _bytes_at_embedding(decoder: Decoder, attachment: Attachment, tokens: int, *, waiting: bool) -> int:
    """Beside all gradients, when a trained embedding's is made: its rows', twice, and its part of a sum.

    Parts are added if the head is tied to it, and if gradients of other micro-batches are `waiting`.
    """
    weight = decoder.tok_embeddings.weight
    if "tok_embeddings.weight" not in attachment.trainable:
        return 0
    parts = (decoder.output is None) + waiting
    return weight.element_size() * (parts * weight.numel() + 2 * tokens * decoder.args.embedding_dim)


def _feed_forward_backward_bytes(decoder: Decoder, tokens: int) -> int:
    """The gradient of the block's output, and of what w2 reads and of what it is made of: F each, one for a moment."""
    args, width = decoder.args, torch.finfo(decoder.dtype).bits // 8
    return tokens * width * (args.dim + (3 if args.gated else 2) * args.hidden_dim // decoder.ranks)


def _attention_backward_bytes(decoder: Decoder, tokens: int, longest: int, device: torch.device) -> int:
    """Gradients of the block's middle and of attention's result, and what attention's own backward takes.

    On CUDA in half precision that is the gradients of q, k and v, and an fp32 sum for q's.
    """
    args, width = decoder.args, torch.finfo(decoder.dtype).bits // 8
    heads, kv_heads, head_dim = _heads(decoder)
    given = tokens * width * (args.dim + heads * head_dim)
    if _has_kernel(decoder, device):
        return given + tokens * heads * head_dim * (3 * width + 4)
    if attends(device, decoder.dtype, head_dim):
        return given + packed_backward_bytes(tokens, longest, heads, kv_heads, head_dim, decoder.dtype)
    lengths = (longest,) * (tokens // longest) + ((tokens % longest,) if tokens % longest else ())
    windows = {args.window(i) for i in range(args.n_layers)}
    return given + max(backward_bytes(lengths, heads, kv_heads, head_dim, decoder.dtype, w) for w in windows)


def _has_kernel(decoder: Decoder, device: torch.device) -> bool:
    """Whether one call attends in all documents; it is given k and v for every query head."""
    return device.type == "cuda" and decoder.dtype in (torch.float16, torch.bfloat16)


def _heads(decoder: Decoder) -> tuple[int, int, int]:
    """Query and key/value heads of this rank, and their width in attention."""
    args = decoder.args
    width = args.head_dim + (LEAN_WIDTH if args.position == "alibi" else 0)
    return args.n_heads // decoder.ranks, args.n_kv_heads // decoder.ranks, width


def _feed_forward_keeps(decoder: Decoder, tokens: int) -> int:
    """Of what a block keeps, what is gone when attention's backward comes."""
    args, width = decoder.args, torch.finfo(decoder.dtype).bits // 8
    lora = [m for m in _lora_linears(decoder) if m in set(decoder.layers[0].feed_forward.modules())]
    numbers = args.hidden_dim // decoder.ranks * (2 if args.gated else 1) + sum(len(m.lora_a.weight) for m in lora)
    norms = 0 if args.parallel_residual else 2 if args.norm_placement == "both" else 1
    return tokens * width * numbers + _norm_bytes(decoder, tokens, inputs=norms, norms=norms)


def _optimizer_workspace(optim: str, trained: dict[str, nn.Parameter], device: torch.device) -> int:
    """Bytes beside gradients: on a CPU bitsandbytes steps on a parameter by way of fp32 copies.

    They are five where its moments are in 8 bits, and three where they are not.
    """
    if device.type != "cpu" or optim != "adamw8bit":
        return 0
    return max(4 * p.numel() * (5 if state_bytes(optim, {n: p}) < 8 * p.numel() else 3) for n, p in trained.items())


def _bytes(module: nn.Module, attachment: Attachment, *, trained: bool, prefix: str = "") -> int:
    return sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in module.named_parameters()
        if (prefix + name in attachment.trainable) == trained
    )


def activation_bytes(
    decoder: Decoder,
    attachment: Attachment,
    tokens: int,
    *,
    checkpointing: int,
    device: torch.device = CPU,
    offload: bool = False,
) -> int:
    """Bytes the forward of `tokens` supervised tokens keeps for the backward, on this rank, parameters aside.

    The first `checkpointing` blocks keep their input, the others all they compute. Where there are no others, what the
    one block being run again keeps comes on top; else it takes the place of what is gone by then. On top: what stands
    before the blocks and behind them, the loss's gradient and row numbers, the shared rotations, and what training the
    head takes.
    """
    layers = len(decoder.layers)
    options = {"recomputed": checkpointing, "device": device, "offload": offload, "again": checkpointing == layers}
    kept = _kept_by_blocks(decoder, attachment, tokens, layers, **options)
    return kept + _kept_beside_blocks(decoder, attachment, tokens) + _exit_bytes(decoder, attachment, tokens)


def _kept_by_blocks(
    decoder: Decoder,
    attachment: Attachment,
    tokens: int,
    blocks: int,
    *,
    recomputed: int,
    device: torch.device,
    offload: bool,
    again: bool = False,
) -> int:
    """What the first `blocks` blocks keep, `recomputed` of them their input only; `again`: the last is run again.

    Of inputs that are offloaded three are on the device. If no block is recomputed, norms of the first one's input keep
    nothing where neither they nor anything below is trained.
    """
    args = decoder.args
    x = tokens * args.dim * torch.finfo(decoder.dtype).bits // 8
    block = block_activation_bytes(decoder, attachment, tokens, device)
    kept = (blocks - recomputed) * block + (min(recomputed, 3) if offload else recomputed) * x
    if again:
        # A block's input is among what it keeps, unless its norms stand behind and nothing else wants it.
        inside = args.norm_placement != "after" or any(
            _keeps_input(name, decoder, attachment) for name in ("wq", "wk", "wv")
        )
        kept += block - inside * x
    return kept if recomputed else kept - _needless_in_first_block(decoder, attachment, tokens)


def _kept_beside_blocks(decoder: Decoder, attachment: Attachment, tokens: int) -> int:
    """What stands before the blocks, the loss's row numbers, shared rotations, and the gradient of a trained head."""
    args = decoder.args
    kept = _entrance_bytes(decoder, attachment, tokens)
    kept += tokens * (8 + (4 * args.rotary_dim if args.position == "rotary" else 0))
    # The head's gradient is made in the forward.
    return kept + _trains_head(decoder, attachment) * 4 * decoder.head_weight.numel()


def _trains_head(decoder: Decoder, attachment: Attachment) -> bool:
    return ("tok_embeddings" if decoder.output is None else "output") + ".weight" in attachment.trainable


def _norm_bytes(decoder: Decoder, tokens: int, *, inputs: int = 1, norms: int = 1) -> int:
    """What `norms` norms keep of `inputs` different inputs: those, and the inverse deviation and perhaps the mean."""
    width, numbers = torch.finfo(decoder.dtype).bits // 8, 2 if decoder.args.norm == "layer" else 1
    return tokens * (inputs * width * decoder.args.dim + norms * 4 * numbers)


_ENTRANCE = ("tok_embeddings.", "project_in.", "pos_embeddings.", "tok_norm.")


def _needless_in_first_block(decoder: Decoder, attachment: Attachment, tokens: int) -> int:
    """What the first block does not keep because its input needs no gradient."""
    args = decoder.args
    if args.norm_placement == "after" or _trains(_ENTRANCE, attachment):
        return 0
    readers = {"attention_norm": ("wq", "wk", "wv")}
    if args.parallel_residual:
        readers["ffn_norm"] = ("w1", "w3")
    if any(f"layers.0.{norm}.weight" in attachment.trainable for norm in readers):
        return 0
    # A linear that makes the norm's result again keeps x for it, and RMSNorm's scale; LayerNorm's two it computes anew.
    again = sum(any(_keeps_input(name, decoder, attachment) for name in names) for names in readers.values())
    unused = len(readers) - (again if args.norm == "rms" else 0)
    width = torch.finfo(decoder.dtype).bits // 8
    needless = _norm_bytes(decoder, tokens, inputs=not again, norms=unused)
    if args.parallel_residual and not _trains("layers.0.feed_forward.", attachment):
        needless += tokens * width * args.hidden_dim // decoder.ranks * (2 if args.gated else 1)
    if args.qk_norm:
        projections = tuple(f"layers.0.attention.{name}." for name in ("wq", "wk", "wv"))  # one function: all or none
        for letter, heads in (("q", args.n_heads), ("k", args.n_kv_heads)):
            if not _trains((*projections, f"layers.0.attention.{letter}_norm."), attachment):
                needless += tokens * (width * args.head_dim + 4) * heads // decoder.ranks
    return needless


def _trains(prefix: str | tuple[str, ...], attachment: Attachment) -> bool:
    return any(name.startswith(prefix) for name in attachment.trainable)


def _entrance_bytes(decoder: Decoder, attachment: Attachment, tokens: int) -> int:
    """What embedding, projection, positions and norm before the blocks keep, if any of them is trained."""
    trained = {name.split(".")[0] for name in attachment.trainable}
    kept = 0
    if "tok_embeddings" in trained:
        kept += 9 * tokens  # row numbers, and which of them are other ranks'
    if "pos_embeddings" in trained:
        kept += 8 * tokens
    if "project_in" in trained:
        kept += tokens * decoder.args.embedding_dim * torch.finfo(decoder.dtype).bits // 8
    if decoder.tok_norm is not None and _trains(_ENTRANCE, attachment):
        kept += _norm_bytes(decoder, tokens)
    return kept


def _exit_bytes(decoder: Decoder, attachment: Attachment, tokens: int) -> int:
    """What norm and projection behind the blocks keep, and the loss's gradient."""
    args, width = decoder.args, torch.finfo(decoder.dtype).bits // 8
    kept = tokens * args.embedding_dim * width
    if args.final_norm:
        kept += _norm_bytes(decoder, tokens)
    if "project_out.weight" in attachment.trainable:
        kept += tokens * args.dim * width
    return kept


def block_activation_bytes(decoder: Decoder, attachment: Attachment, tokens: int, device: torch.device = CPU) -> int:
    """Bytes one block keeps for its backward, for `tokens` tokens, on this rank.

    Always: the inputs of its norms (D each; one where the block is parallel) with a number or two a token, q, k and v,
    and what the activation reads (F, twice where it gates) or, of ReLU, makes. A CUDA kernel is given k and v for every
    query head, and also keeps its result and a 4-byte log-sum a head. ALiBi widens heads; norms of q and k keep these
    as they were before. LoRA adds R a linear. What a linear with LoRA or a trained weight reads is kept already or made
    again, but for wo's input (that of a kernel without ALiBi is its result), and those of wq, wk, wv and w1, w3 where
    norms stand behind.
    """
    args, ranks = decoder.args, decoder.ranks
    width = torch.finfo(decoder.dtype).bits // 8
    heads, kv_heads, head = _heads(decoder)
    f_width, kernel = args.hidden_dim // ranks, _has_kernel(decoder, device)
    per_token = (4 * width * head + 4) * heads if kernel else width * head * (heads + 2 * kv_heads)
    if args.qk_norm:
        per_token += (width * args.head_dim + 4) * (heads + kv_heads)
    per_token += width * f_width * (2 if args.gated else 1)
    shared = []
    if args.norm_placement == "after":  # what stands before attention and feed-forward is no norm's, to be made again
        shared += [(("wq", "wk", "wv"), args.dim), (("w1", "w3"), args.dim)]
    if args.position == "alibi" or not kernel:
        shared.append((("wo",), heads * args.head_dim))
    for linears, size in shared:
        if any(_keeps_input(name, decoder, attachment) for name in linears):
            per_token += width * size
    per_token += width * sum(linear.lora_a.weight.shape[0] for linear in _lora_linears(decoder))
    norms = 4 if args.norm_placement == "both" else 2
    return per_token * tokens + _norm_bytes(decoder, tokens, inputs=norms - args.parallel_residual, norms=norms)


def _keeps_input(name: str, decoder: Decoder, attachment: Attachment) -> bool:
    """Whether a linear called `name` is there and keeps the input it was given."""
    linear = next((m for n, m in decoder.layers[0].named_modules() if n.endswith(f".{name}")), None)
    trained = any(n.startswith("layers.0.") and n.endswith(f".{name}.weight") for n in attachment.trainable)
    return trained or linear in _lora_linears(decoder)


def _buffers(decoder: Decoder, tokens: int, device: torch.device) -> int:
    """What kernels of packed matrices work in, and what others are unpacked into."""
    found = [
        memory_to_multiply([m.weight for m in linears], [_rank(m) for m in linears], tokens, decoder.dtype, device)
        for layer in decoder.layers
        for part in (layer.attention, layer.feed_forward)
        for linears in part.called_together()
    ]
    return max(workspace for workspace, _ in found) + max(borrowed for _, borrowed in found)


def _rank(linear: Linear) -> int:
    return 0 if linear.lora_a is None else len(linear.lora_a.weight)


def _lora_linears(decoder: Decoder) -> list[Linear]:
    return [m for m in decoder.layers[0].modules() if isinstance(m, Linear) and m.lora_a is not None]


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
