"""Zero-init attention (LLaMA-Adapter, Zhang et al. 2023): queries also attend to a learned prefix, by a gate.

The prefix has a softmax of its own, so that the text's attention stays what it was, and what it gives is multiplied by
tanh(gate). Gates start at zero: a new adapter changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from accessory.model.args import ModelArgs
from accessory.model.attention import Attention, AttentionAddition
from accessory.model.cache import LayerCache
from accessory.model.decoder import Decoder
from accessory.model.decoding import decodes
from accessory.model.linear import project_columns
from accessory.model.sequences import Sequences
from accessory.parallel.data import is_sharded
from accessory.parallel.tensor import WHOLE, Slicing, mark

_ROWS = 512  # tokens computed at a time, so that their fp32 copies stay small


@dataclass(frozen=True, eq=False)
class PrefixKeys:
    """What a block attends to beside the text: keys and values [P, K, E] of its prefix, and fp32 gates [H]."""

    keys: Tensor
    values: Tensor
    gates: Tensor

    def set_to(self, other: PrefixKeys) -> None:
        """Copy `other` into these tensors."""
        for name in ("keys", "values", "gates"):
            getattr(self, name).copy_(getattr(other, name))


class PrefixAttention(AttentionAddition):
    """gate x softmax(q k^T / sqrt(E)) v, where the block's own wk and wv make k and v of its rows of the prefix.

    Keys stand at no position: they are not rotated, and ALiBi does not count. index: which rows of `AdapterDecoder`.
    """

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.prepared: PrefixKeys | None = None

    def forward(self, q: Tensor, sequences: Sequences, attention: Attention) -> Tensor:
        """See `AttentionAddition`; `sequences.prefixes` holds the rows and gates, unless keys were prepared."""
        if self.prepared is None or torch.is_grad_enabled():
            made = made_keys(*sequences.prefixes[self.index], attention)
        else:
            made = self.prepared
        given = q, made.keys, made.values, made.gates
        return _attended(*given) if decodes() else _PrefixAttention.apply(*given)

    def prepare(self, made: PrefixKeys) -> None:
        """Attend to `made` from now on, where no gradient is wanted. It is copied to where earlier ones were."""
        if self.prepared is None:
            self.prepared = made
        else:
            self.prepared.set_to(made)

    def place(self) -> object:
        """See `AttentionAddition`."""
        return self.prepared

    def work_bytes(self, tokens: int, heads: int, head_dim: int) -> int:
        """See `AttentionAddition`: fp32 copies of queries, of two gradients and of a product, of some rows."""
        return 4 * 4 * min(tokens, _ROWS) * heads * head_dim

    def train(self, mode: bool = True) -> PrefixAttention:
        """As every module's; it discards what was prepared."""
        self.prepared = None
        return super().train(mode)


def made_keys(rows: Tensor, gates: Tensor, attention: Attention) -> PrefixKeys:
    """Keys and values that `attention` makes of a prefix's rows [P, D]; gates as they are used, fp32 [H]."""
    projected = project_columns(rows, [attention.wk, attention.wv])
    keys, values = (y.view(len(rows), -1, attention.head_dim) for y in projected)
    return PrefixKeys(keys if attention.k_norm is None else attention.k_norm(keys), values, gates)


class _PrefixAttention(torch.autograd.Function):
    """Computed in fp32. Nothing is kept but the inputs, of which attention keeps the queries anyway."""

    @staticmethod
    def forward(ctx, q: Tensor, keys: Tensor, values: Tensor, gates: Tensor) -> Tensor:
        """q [T, H, E], keys and values [P, K, E], gates [H] -> [T, H, E] in q's dtype."""
        ctx.save_for_backward(q, keys, values, gates)
        return _attended(q, keys, values, gates)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dy [T, H, E] -> the gradients of all inputs, each in its own dtype."""
        q, keys, values, gates = ctx.saved_tensors
        k, v, g = _wide(keys), _wide(values), _by_group(gates, keys)
        dq, dk, dv, dg = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(g)
        for some in _parts(len(q)):
            part, given = _grouped(q[some], keys), _grouped(dy[some], keys)
            weights = _weights(part, k)
            dweights = torch.einsum("tkge,pke->tkgp", given, v)
            dg += (weights * dweights).sum((0, 3))[..., None]
            dv += torch.einsum("tkgp,tkge->pke", weights * g, given)
            dscores = weights * g * (dweights - (weights * dweights).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
            dk += torch.einsum("tkgp,tkge->pke", dscores, part)
            dq[some] = torch.einsum("tkgp,pke->tkge", dscores, k).flatten(1, 2)
        return dq, dk.to(keys.dtype), dv.to(values.dtype), dg.flatten().to(gates.dtype)


def _attended(q: Tensor, keys: Tensor, values: Tensor, gates: Tensor) -> Tensor:
    k, v, g = _wide(keys), _wide(values), _by_group(gates, keys)
    parts = [
        torch.einsum("tkgp,pke->tkge", _weights(_grouped(q[some], keys), k) * g, v).to(q.dtype).flatten(1, 2)
        for some in _parts(len(q))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """q [T, K, G, E], k [P, K, E] -> how much each query of a group attends to each row [T, K, G, P]."""
    return (torch.einsum("tkge,pke->tkgp", q, k) * q.shape[-1] ** -0.5).softmax(-1)


def _grouped(x: Tensor, keys: Tensor) -> Tensor:
    """x [T, H, E] -> wide [T, K, G, E]: the heads that read one key/value head, together."""
    return _wide(x).unflatten(1, (keys.shape[1], -1))


def _by_group(gates: Tensor, keys: Tensor) -> Tensor:
    """[H] -> [K, G, 1]."""
    return gates.view(keys.shape[1], -1, 1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _parts(tokens: int) -> list[slice]:
    return [slice(start, start + _ROWS) for start in range(0, max(tokens, 1), _ROWS)]


class AdapterDecoder(Decoder):
    """The base, whose last `layers` blocks attend to a prefix of `length` rows each (LLaMA2-Accessory's names).

    prefix [layers, 1, length, D]; prefix_gate [layers, H], one for each head, of which a rank has its own;
    prefix_new_gate [layers], a factor without tanh, where there is one. All are fp32.
    """

    def __init__(self, args: ModelArgs, layers: int, length: int, new_gate: bool, **how: Any) -> None:
        super().__init__(args, **how)
        self.prefix = _parameter((layers, 1, length, args.dim), WHOLE)
        self.prefix_gate = _parameter((layers, args.n_heads // self.ranks), Slicing(dim=1))
        # Each rank's heads give it a share of its gradient.
        self.prefix_new_gate = _parameter((layers,), Slicing(partial=True)) if new_gate else None
        for index, block in enumerate(self.layers[args.n_layers - layers :]):
            block.attention.addition = PrefixAttention(index)

    def states(self, x: Tensor, sequences: Sequences, cache: list[LayerCache] | None = None) -> Iterator[Tensor]:
        """As `Decoder.states`; the blocks get their rows and gates with the sequences."""
        if torch.is_grad_enabled() or any(addition.prepared is None for _, addition in self._prefixed()):
            sequences = replace(sequences, prefixes=self._prefixes())
        yield from super().states(x, sequences, cache)

    @torch.inference_mode()
    def prepare_decoding(self) -> None:
        """Keys and values of the prefixes too."""
        super().prepare_decoding()
        if is_sharded(self.prefix):
            return
        prefixes = self._prefixes()
        for attention, addition in self._prefixed():
            if not any(map(is_sharded, attention.parameters())):
                addition.prepare(made_keys(*prefixes[addition.index], attention))

    def _prefixes(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """(rows [P, D] in the decoder's dtype, gates fp32 [H]) of each of the last blocks."""
        gates = self.prefix_gate.tanh()
        if self.prefix_new_gate is not None:
            gates = gates * self.prefix_new_gate[:, None]
        return tuple(zip(self.prefix[:, 0].to(self.dtype).unbind(), gates.unbind(), strict=True))

    def _prefixed(self) -> Iterator[tuple[Attention, PrefixAttention]]:
        """Attention and its addition, of the blocks that have one."""
        for block in self.layers[self.args.n_layers - len(self.prefix_gate) :]:
            yield block.attention, block.attention.addition


def _parameter(shape: tuple[int, ...], slicing: Slicing) -> nn.Parameter:
    return mark(nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta")), slicing)
