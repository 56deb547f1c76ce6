"""Quantizes a model: widths, block after block, the last pass; from a folder it goes on after it was stopped."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.lazy import HeldTensor, PackedTensor
from accessory.checkpoint.whole import WholeModel
from accessory.model.loss import cross_entropy_sum
from accessory.parallel.groups import Layout, data_parallel_group
from accessory.quant import MIXES
from accessory.quant.groups import group_storage
from accessory.quantizer.blocks import Blocks, batches, linears
from accessory.quantizer.distillation import distill, last_states, packed_decoder
from accessory.quantizer.folder import STATES, Folder
from accessory.quantizer.one_block import FORWARD, Packed, Rows, quantize_block
from accessory.quantizer.reconstruction import clock
from accessory.quantizer.sensitivity import measure
from accessory.quantizer.settings import HELD, Settings
from accessory.quantizer.states import States
from accessory.quantizer.strategy import Width, choose, widths_of

MEASURED = 8
"""Rows that the linears of a mix are chosen by."""
_WIDTHS, _STATISTICS = "widths.json", "statistics.safetensors"


class Quantization:
    """The quantization of `model` by calibration `ids` [R, S], whose last `HELD` rows are only measured.

    folder: where it keeps what is finished, and finds it again; opened. say: gets a line for each step of the way.
    Under data parallelism each rank has its own rows.
    """

    def __init__(
        self,
        model: WholeModel,
        ids: Tensor,
        settings: Settings,
        folder: Folder,
        *,
        dtype: torch.dtype,
        layout: Layout,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.settings, self.folder, self.say = model, settings, folder, say
        fitted, ranks = len(ids) - HELD, layout.dp_size
        mixed = torch.randperm(fitted, generator=torch.Generator().manual_seed(settings.seed))
        ids = torch.cat([ids[mixed], ids[fitted:]])
        own = torch.cat([part[layout.dp_rank :: ranks] for part in ids.split((fitted, HELD))])
        self.rows = Rows(own, fitted // ranks, settings.seed, layout, data_parallel_group())
        self.measured = ids[: min(MEASURED, fitted)][layout.dp_rank :: ranks]
        self.blocks = Blocks(model.args, model.tensors, dtype, layout)

    def run(self) -> tuple[WholeModel, dict[str, Width], dict[str, Any]]:
        """(the model with packed linears, their widths by full name, figures of all that was done)."""
        started = time.monotonic()
        widths, progress = self._widths(), self.folder.progress()
        before, done = progress["seconds"], len(progress["blocks"])
        if done:
            self.say(f"{self.folder.path}: {done} blocks are done; goes on with the next.")
        else:
            self._begin()
        begun = time.monotonic()
        for index in range(done, len(self.blocks)):
            progress["blocks"].append(self._block(index, widths))
            progress["seconds"] = before + time.monotonic() - started
            self.folder.finish(index, progress)
            left = (len(self.blocks) - index - 1) * (time.monotonic() - begun) / (index + 1 - done)
            self._tell(index, progress["blocks"][-1], left)
        figures = {"blocks": progress["blocks"]} | self._last_pass(widths)
        model = self._packed_model(widths)
        seconds = before + time.monotonic() - started
        return model, widths, figures | {"bits": _bits(model), "seconds": seconds}

    def _widths(self) -> dict[str, Width]:
        """Full name of each linear -> its width, measured once where the type is a mix."""
        width = widths_of(self.settings.quant_type)
        if width is not None:
            names = [f"{name}.{linear}" for name, block in self.blocks.decoder.blocks() for linear in linears(block)]
            return dict.fromkeys(names, width)
        known = self.folder.read_json(_WIDTHS)
        if known is None:
            found = measure(self.blocks, self.measured, FORWARD, self.folder, self.say)
            ordered = {name: found[name] for name in sorted(found, key=_place)}
            self.folder.record(_WIDTHS, choose(ordered, MIXES[self.settings.quant_type]))
            known = self.folder.read_json(_WIDTHS)
        return {name: tuple(width) for name, width in known.items()}

    def _begin(self) -> None:
        """Write the first block's inputs, which are the same in both models."""

        def entered() -> Iterator[Tensor]:
            """Some rows at a time."""
            for part in batches(len(self.rows.ids), FORWARD):
                where = self.blocks.sequences(len(part), self.rows.length)
                with torch.no_grad():
                    yield self.blocks.decoder.enter(self.rows.ids[part].flatten().to(self.blocks.layout.device), where)

        for kind in STATES:
            self._states(kind, 0).write(entered())

    def _states(self, kind: str, index: int) -> States:
        """The `full` or `packed` model's inputs of a block, of this rank's rows."""
        return States(self.folder.states(kind, index), (*self.rows.ids.shape, self.model.args.dim), self.blocks.dtype)

    def _block(self, index: int, widths: dict[str, Width]) -> dict[str, Any]:
        """Quantize a block into its file; returns its figures."""
        full, packed = ((self._states(kind, index), self._states(kind, index + 1)) for kind in STATES)
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): width for name, width in widths.items() if name.startswith(prefix)}
        parts, figures = quantize_block(self.blocks, index, own, self.rows, self.settings, full, packed)
        tensors = {f"{prefix}{name}.weight.{part}": value
                   for name, (_, state) in parts.items() for part, value in state.items()}  # fmt: skip
        self.folder.write_tensors(_file(index), tensors)
        return figures

    def _tell(self, index: int, figures: dict[str, Any], left: float) -> None:
        trained = "error {:.5f} -> {:.5f}, ".format(*figures["losses"]) if figures["losses"] else "error "
        self.say(
            f"block {index + 1:3}/{len(self.blocks)} | {trained}held out {figures['error']:.5f}"
            f" | {figures['seconds']:6.1f} s | ETA {clock(left)}"
        )

    def _last_pass(self, widths: dict[str, Width]) -> dict[str, Any]:
        """Distil the full model; returns perplexities of the rows held out: the full model's, before, and after."""
        last, rows, settings = len(self.blocks), self.rows, self.settings
        full, packed = (self._states(kind, last) for kind in STATES)
        found = {"perplexity_full": self._perplexity(full.read(rows.held))}
        found["perplexity_blocks"] = self._perplexity(packed.read(rows.held))
        if not settings.distill_steps:
            return found | {"perplexity": found["perplexity_blocks"], "divergences": []}
        decoder = packed_decoder(self.blocks, [self._read(index, widths) for index in range(last)])
        epochs = -(-settings.distill_steps // (rows.fitted * rows.layout.dp_size // settings.distill_batch))
        steps = rows.steps(epochs, settings.distill_batch, last)[: settings.distill_steps]
        self.say(f"last pass: {len(steps)} steps over the whole model")
        found["divergences"] = distill(self.blocks, rows.ids, full, steps, settings.distill_rate, rows.group, self.say)
        weights = {f"{name}.weight": decoder.get_submodule(f"{name}.weight") for name in widths}
        trained = {f"{name}.{part}": getattr(weight, part).detach().half()
                   for name, weight in weights.items() for part in weight.trained}  # fmt: skip
        self.folder.write_tensors(_STATISTICS, trained)
        with torch.no_grad():
            return found | {"perplexity": self._perplexity(last_states(self.blocks, rows.ids[rows.held]))}

    @torch.no_grad()
    def _perplexity(self, states: Tensor) -> float:
        """Of the rows held out, from the last block's outputs [T, D]."""
        decoder, ids = self.blocks.decoder, self.rows.ids[self.rows.held]
        labels = torch.full_like(ids, -1)
        labels[:, :-1] = ids[:, 1:]
        hidden, labels = (each.to(self.blocks.layout.device) for each in (states, labels.flatten()))
        loss = cross_entropy_sum(decoder.leave(hidden), decoder.head_weight, labels, decoder.args.vocab_size)
        return float(torch.tensor(self.rows.mean(loss / (labels >= 0).sum())).exp())

    def _read(self, index: int, widths: dict[str, Width]) -> Packed:
        """A finished block's parts."""
        tensors, prefix = self.folder.read_tensors(_file(index)), f"layers.{index}."
        found: Packed = {}
        for full, width in widths.items():
            if full.startswith(prefix):
                kind = group_storage(*width, ("points",) if self.settings.whole_points else ())
                found[full.removeprefix(prefix)] = kind, {part: tensors[f"{full}.weight.{part}"] for part in kind.PARTS}
        return found

    def _packed_model(self, widths: dict[str, Width]) -> WholeModel:
        statistics = self.folder.read_tensors(_STATISTICS) if self.settings.distill_steps else {}
        tensors = dict(self.model.tensors)
        for index in range(len(self.blocks)):
            for linear, (kind, state) in self._read(index, widths).items():
                name = f"layers.{index}.{linear}.weight"
                parts = {part: HeldTensor(statistics.get(f"{name}.{part}", value)) for part, value in state.items()}
                tensors[name] = PackedTensor.of(parts, kind, tensors[name].shape, name)
        return replace(self.model, tensors=tensors)


def identity_of(settings: Settings, ids: Tensor, base: str, dtype: torch.dtype, ranks: int) -> dict[str, Any]:
    """All that a quantization follows from, as JSON; base: its fingerprint."""
    text = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    return asdict(settings) | {"base": base, "text": text, "dtype": str(dtype), "ranks": ranks}


def _file(index: int) -> str:
    return f"block-{index}.safetensors"


def _place(name: str) -> tuple[int, str]:
    _, index, linear = name.split(".", 2)
    return int(index), linear


def _bits(model: WholeModel) -> float:
    """True bits a weight of the packed linears, statistics included."""
    packed = [tensor for tensor in model.tensors.values() if isinstance(tensor, PackedTensor)]
    numbers = sum(tensor.shape[0] * tensor.shape[1] for tensor in packed)
    return 8 * sum(part.read().nbytes for tensor in packed for part in tensor.parts.values()) / numbers
