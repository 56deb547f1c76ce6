"""Zero-init attention (LLaMA-Adapter, Zhang et al. 2023): queries also attend to a learned prefix, by a gate.

The prefix has a softmax of its own, so that the text's attention stays what it was, and what it gives is multiplied by
tanh(gate). Gates start at zero: a new adapter changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from accessory.model.args import ModelArgs
from accessory.model.attention import Attention, AttentionAddition
from accessory.model.cache import LayerCache
from accessory.model.decoder import Decoder
from accessory.model.decoding import decodes
from accessory.model.linear import project_columns, wide_rows
from accessory.model.sequences import Sequences
from accessory.parallel.data import is_sharded
from accessory.parallel.tensor import WHOLE, Slicing, mark


@dataclass(frozen=True, eq=False)
class PrefixKeys:
    """What a block attends to beside the text: keys and values [n, P, K, E] of n prefixes, and fp32 gates [H]."""

    keys: Tensor
    values: Tensor
    gates: Tensor

    def set_to(self, other: PrefixKeys) -> None:
        """Copy `other` into these tensors."""
        for name in ("keys", "values", "gates"):
            getattr(self, name).copy_(getattr(other, name))


class PrefixAttention(AttentionAddition):
    """gate x softmax(q k^T / sqrt(E)) v, where the block's own wk and wv make k and v of its rows of the prefix.

    Keys stand at no position: they are not rotated, and ALiBi does not count. A document with a picture has a prefix of
    its own, whose keys lie in the cache while it is answered. index: which rows of `AdapterDecoder`.
    """

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.prepared: PrefixKeys | None = None

    def forward(self, q: Tensor, sequences: Sequences, attention: Attention, cache: LayerCache | None = None) -> Tensor:
        """See `AttentionAddition`; `sequences.prefixes` holds the rows and gates, unless keys are there already."""
        runs, held = tuple(tokens for tokens, _ in sequences.pictures), {} if cache is None else cache.beside
        ready = None if torch.is_grad_enabled() else self.prepared
        if held and sequences.continued and not runs:
            gates = sequences.prefixes[self.index][1] if ready is None else ready.gates
            made, runs = PrefixKeys(held["keys"], held["values"], gates), sequences.lengths
        elif ready is not None and not runs:
            made = ready
        else:
            made = made_keys(*sequences.prefixes[self.index], attention)
            for name, kept in held.items():
                kept.copy_(getattr(made, name))
        given = q, made.keys, made.values, made.gates, runs or (len(q),)
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

    def work_bytes(self, tokens: int, heads: int, head_dim: int, device: torch.device) -> int:
        """See `AttentionAddition`: fp32 copies of queries, of two gradients and of a product, of some tokens."""
        return 4 * 4 * min(tokens, wide_rows(device)) * heads * head_dim

    def train(self, mode: bool = True) -> PrefixAttention:
        """As every module's; it discards what was prepared."""
        self.prepared = None
        return super().train(mode)


def made_keys(rows: Tensor, gates: Tensor, attention: Attention) -> PrefixKeys:
    """Keys and values that `attention` makes of the rows [n, P, D] of prefixes; gates as they are used, fp32 [H]."""
    projected = project_columns(rows.flatten(0, 1), [attention.wk, attention.wv])
    keys, values = (y.view(len(y), -1, attention.head_dim) for y in projected)
    keys = keys if attention.k_norm is None else attention.k_norm(keys)
    return PrefixKeys(keys.unflatten(0, rows.shape[:2]), values.unflatten(0, rows.shape[:2]), gates)


class _PrefixAttention(torch.autograd.Function):
    """Computed in fp32. Nothing is kept but the inputs, of which attention keeps the queries anyway."""

    @staticmethod
    def forward(ctx, q: Tensor, keys: Tensor, values: Tensor, gates: Tensor, runs: tuple[int, ...]) -> Tensor:
        """q [T, H, E], keys and values [n, P, K, E], gates [H] -> [T, H, E] in q's dtype.

        runs: how many tokens attend to each of the n prefixes, in order.
        """
        ctx.save_for_backward(q, keys, values, gates)
        ctx.runs = runs
        return _attended(q, keys, values, gates, runs)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dy [T, H, E] -> the gradients of the tensors, each in its own dtype."""
        q, keys, values, gates = ctx.saved_tensors
        k, v, g = _wide(keys), _wide(values), _by_group(gates, keys)
        dq, dk, dv, dg = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(g)
        for some, i in _parts(ctx.runs, q.device):
            part, given = _grouped(q[some], keys), _grouped(dy[some], keys)
            weights = _weights(part, k[i])
            dweights = torch.einsum("tkge,pke->tkgp", given, v[i])
            dg += (weights * dweights).sum((0, 3))[..., None]
            dv[i] += torch.einsum("tkgp,tkge->pke", weights * g, given)
            dscores = weights * g * (dweights - (weights * dweights).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
            dk[i] += torch.einsum("tkgp,tkge->pke", dscores, part)
            dq[some] = torch.einsum("tkgp,pke->tkge", dscores, k[i]).flatten(1, 2)
        return dq, dk.to(keys.dtype), dv.to(values.dtype), dg.flatten().to(gates.dtype), None


def _attended(q: Tensor, keys: Tensor, values: Tensor, gates: Tensor, runs: tuple[int, ...]) -> Tensor:
    k, v, g = _wide(keys), _wide(values), _by_group(gates, keys)
    if len(runs) == len(q) > 1:  # a token of each document, as while answers are given
        weights = (torch.einsum("tkge,tpke->tkgp", _grouped(q, keys), k) * q.shape[-1] ** -0.5).softmax(-1)
        return torch.einsum("tkgp,tpke->tkge", weights * g, v).to(q.dtype).flatten(1, 2)
    parts = [
        torch.einsum("tkgp,pke->tkge", _weights(_grouped(q[some], keys), k[i]) * g, v[i]).to(q.dtype).flatten(1, 2)
        for some, i in _parts(runs, q.device)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """q [T, K, G, E], k [P, K, E] -> how much each query of a group attends to each row [T, K, G, P]."""
    return (torch.einsum("tkge,pke->tkgp", q, k) * q.shape[-1] ** -0.5).softmax(-1)


def _grouped(x: Tensor, keys: Tensor) -> Tensor:
    """x [T, H, E] -> wide [T, K, G, E]: the heads that read one key/value head, together."""
    return _wide(x).unflatten(1, (keys.shape[-2], -1))


def _by_group(gates: Tensor, keys: Tensor) -> Tensor:
    """[H] -> [K, G, 1]."""
    return gates.view(keys.shape[-2], -1, 1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _parts(runs: tuple[int, ...], device: torch.device) -> list[tuple[slice, int]]:
    """(tokens that are computed together, which prefix they attend to), in order."""
    found, begin, most = [], 0, wide_rows(device)
    for i, tokens in enumerate(runs):
        end = begin + tokens
        found += [(slice(start, min(start + most, end)), i) for start in range(begin, end, most)]
        begin = end
    return found


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
        needed = torch.is_grad_enabled() or any(addition.prepared is None for _, addition in self._prefixed())
        if needed or sequences.pictures:
            sequences = replace(sequences, prefixes=self._prefixes([picture for _, picture in sequences.pictures]))
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

    def make_room_for_pictures(self, cache: list[LayerCache]) -> None:
        """See `Decoder.make_room_for_pictures`: keys and values of each document's prefix."""
        length = self.prefix.shape[2]
        for layer in cache[self.args.n_layers - len(self.prefix_gate) :]:
            if not layer.beside:
                shape = (len(layer.keys), length, layer.keys.shape[2], self.args.head_dim)
                layer.beside = {name: layer.keys.new_zeros(shape) for name in ("keys", "values")}

    def _prefixes(self, pictures: Sequence[Tensor | None] = ()) -> tuple[tuple[Tensor, Tensor], ...]:
        """(rows [n, P, D] in the decoder's dtype, gates fp32 [H]) of each of the last blocks.

        pictures: of each of n prefixes what is added to it, [P, D], or None; without any there is one prefix.
        """
        gates = self.prefix_gate.tanh()
        if self.prefix_new_gate is not None:
            gates = gates * self.prefix_new_gate[:, None]
        rows = self.prefix.to(self.dtype)
        if pictures:
            nothing = rows.new_zeros(rows.shape[2:])
            rows = rows + torch.stack([nothing if picture is None else picture.to(rows) for picture in pictures])
        return tuple(zip(rows.unbind(), gates.unbind(), strict=True))

    def _prefixed(self) -> Iterator[tuple[Attention, PrefixAttention]]:
        """Attention and its addition, of the blocks that have one."""
        for block in self.layers[self.args.n_layers - len(self.prefix_gate) :]:
            yield block.attention, block.attention.addition


def _parameter(shape: tuple[int, ...], slicing: Slicing) -> nn.Parameter:
    return mark(nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta")), slicing)
