"""Side tuning written from its formulas (QST, Zhang et al. 2024), in float64, one document at a time, for tests."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    """LayerNorm if it has a bias, else RMSNorm."""
    if f"{name}.bias" in w:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * w[f"{name}.weight"]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """x W^T + b and LoRA's x A^T B^T, with b and LoRA if there are some."""
    y = F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))
    return (
        y + x @ w[f"{name}.lora_a.weight"].t() @ w[f"{name}.lora_b.weight"].t() if f"{name}.lora_a.weight" in w else y
    )


def rotated(x: Tensor, theta: float) -> Tensor:
    """Queries or keys [heads, S, E], channel i together with i + E / 2."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * theta ** -(torch.arange(half, dtype=x.dtype) / half)
    one, other = x[..., :half], x[..., half:]
    return torch.cat([one * angles.cos() - other * angles.sin(), other * angles.cos() + one * angles.sin()], -1)


def block(w: Weights, name: str, x: Tensor, args: dict, learned: Tensor | None = None) -> Tensor:
    """One decoder block of LLaMA (rotary, gated SiLU) or OPT (ReLU), norms before attention and MLP.

    learned: of each token of x [S, D], whether keys and values have a gradient; None: all have.
    """
    heads, kv_heads = args["n_heads"], args["n_kv_heads"]
    h = norm(w, f"{name}.attention_norm", x, args["norm_eps"])
    q, k, v = (linear(w, f"{name}.attention.{part}", h).unflatten(-1, (count, -1)).transpose(0, 1)
               for part, count in (("wq", heads), ("wk", kv_heads), ("wv", kv_heads)))  # fmt: skip
    if learned is not None:
        k, v = (torch.where(learned[:, None], part, part.detach()) for part in (k, v))
    if args["position"] == "rotary":
        q, k = rotated(q, args["rope_theta"]), rotated(k, args["rope_theta"])
    k, v = (part.repeat_interleave(heads // kv_heads, 0) for part in (k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    attended = scores.masked_fill(future, -math.inf).softmax(-1) @ v
    x = x + linear(w, f"{name}.attention.wo", attended.transpose(0, 1).flatten(1))
    h = norm(w, f"{name}.ffn_norm", x, args["norm_eps"])
    inner = linear(w, f"{name}.feed_forward.w1", h)
    inner = F.silu(inner) * linear(w, f"{name}.feed_forward.w3", h) if args["gated"] else inner.relu()
    return x + linear(w, f"{name}.feed_forward.w2", inner)


def downsampled(w: Weights, name: str, state: Tensor, settings: dict) -> Tensor:
    """What the side reads of a base state [S, D]."""
    kind, r = settings["downsample"], settings["r"]
    if kind == "linear":
        return state @ w[f"{name}.weight.weight"].t()
    if kind == "avgpool":
        return F.avg_pool1d(state, r)
    if kind == "maxpool":
        return F.max_pool1d(state, r)
    x = state
    if kind == "adapter" and settings["add_layer_norm_before_adapter"]:
        x = norm(w, f"{name}.norm_before", x, 1e-5)
    x = x @ w[f"{name}.a.weight"].t()
    if kind == "adapter":
        x = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}[settings["adapter_activation"]](x)
    x = x @ w[f"{name}.b.weight"].t()
    if kind == "adapter" and settings["add_layer_norm_after_adapter"]:
        x = norm(w, f"{name}.norm_after", x, 1e-5)
    return x


def logits(w: Weights, ids: Tensor, labelled: Tensor, args: dict, side_args: dict, settings: dict) -> Tensor:
    """Token ids [S] of one document -> [S, V]; no gradient reaches the base. labelled [S]: whether there is a label."""
    frozen = args["n_layers"] - settings["tail"]
    with torch.no_grad():
        x = w["tok_embeddings.weight"][ids]
        if args["position"] == "learned":
            x = x + w["pos_embeddings.weight"][torch.arange(len(ids)) + args["position_offset"]]
        states = [x]
        for i in range(frozen):
            states.append(block(w, f"layers.{i}", states[-1], args))
        final = states[-1] if settings["tail"] else norm(w, "norm", states[-1], args["norm_eps"])
    if settings["side_layers"]:
        final = mixed(w, final, states, side_args, settings)
    if settings["tail"]:
        learned = None if settings["tail_backward"] == "all" else labelled
        if learned is not None:
            final = torch.where(labelled[:, None], final, final.detach())
        for i in range(frozen, args["n_layers"]):
            final = block(w, f"layers.{i}", final, args, learned)
        final = norm(w, "norm", final, args["norm_eps"])
    return final @ w.get("output.weight", w["tok_embeddings.weight"]).t()


def mixed(w: Weights, final: Tensor, states: list[Tensor], args: dict, settings: dict) -> Tensor:
    """The base's state `final` and what the side network, of `args`, makes of `states`."""
    own = "embedding_downsample" if settings["embedding_downsample"] == "own" else "downsample.0"
    side = downsampled(w, own, states[0], settings)
    count, every = args["n_layers"], settings["side_layers"]
    for i in range(count):
        state, gate = states[len(states) - 1 - (count - 1 - i) * every], torch.sigmoid(w[f"gates.{i}.weight"])
        together = (1 - gate) * downsampled(w, f"downsample.{i}", state, settings) + gate * side
        side = block(w, f"side.{i}", together, args)
    up = linear(w, "upsample", norm(w, "side_norm", side, args["norm_eps"]))
    gate = w["final_gate.weight"]
    if settings["start"] == "released":
        return torch.sigmoid(gate) * final + (1 - torch.sigmoid(gate)) * up
    return final + gate * up
