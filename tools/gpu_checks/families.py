"""Small models of every family, trained by every method on every storage: the card's gradients against float64's.

And the memory that a step takes beside the plan of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from accessory.checkpoint.load import fill, targets
from accessory.checkpoint.training_state import Progress
from accessory.data.batch import IGNORE, PackedBatch
from accessory.meta import MetaModel
from accessory.method import Attachment, Method, presets
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout
from accessory.quant import STORAGES, storage
from tools.benchmarking.training import Training
from tools.gpu_checks.check import Findings, Ground, check
from tools.gpu_checks.rates import begin_peak, peak_bytes, synchronize
from tools.model_sizes import SIZES
from tools.plan import Setting, planned

SIZE = {"dim": 128, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 256, "vocab_size": 515}
LAYER = {"norm": "layer", "n_kv_heads": 4, "gated": False, "activation": "gelu"}
SHAPES: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": 10, "rotary_layout": "halves"},
    "qwen2": {"qkv_bias": True, "rotary_layout": "halves"},
    "qwen3": {"qk_norm": True, "rotary_layout": "halves", "tie_word_embeddings": True, "head_dim": 64},
    "baichuan": {"n_kv_heads": 4, "position": "alibi"},
    "internlm": {"qkv_bias": True, "out_bias": True, "rotary_layout": "halves"},
    "opt": LAYER
    | {"activation": "relu", "position": "learned", "position_offset": 2, "qkv_bias": True, "mlp_bias": True},
    "opt_350m": LAYER
    | {
        "activation": "relu", "position": "learned", "norm_placement": "after", "final_norm": False,
        "embedding_dim": 64,
    },
    "bloom": LAYER | {"position": "alibi", "embedding_norm": True, "tie_word_embeddings": True},
    "gpt_neox": LAYER | {"parallel_residual": True, "rotary_dim": 8, "rotary_layout": "halves", "qkv_bias": True},
    "glm4": {"norm_placement": "both", "rotary_dim": 16},
    "chatglm": {"rotary_dim": 16, "qkv_bias": True, "activation": "gelu_tanh"},
}  # fmt: skip
"""What a small model has to be for its blocks to be those of a family."""
TOLERANCE = {torch.float32: 5e-4, torch.bfloat16: 0.1}
"""Of all gradients of a model together; 8-bit states and activations are coarser, and so is a small side network."""
COARSE, COARSEST = 0.15, 0.3
LENGTHS = (37, 1, 20)


def _methods() -> dict[str, Method]:
    """Every preset, learning from all labels: which ones are drawn depends on the device."""
    found = {}
    for name, method in presets().items():
        shared = {"label_share": 1.0} if "label_share" in type(method.settings).model_fields else {}
        found[name] = type(method)(method.Settings(**method.settings.model_dump(exclude_unset=True) | shared))
    return found


METHODS = _methods()
MOVING = "qsft_quantized"
"""A method whose gradients are of bases that are drawn on the device."""
Cell = tuple[str, str, str | None]
"""(family, method, storage; None: plain)."""


def cells() -> list[Cell]:
    """Every family with every method and with some storages, and methods of each kind with every storage."""
    found: dict[Cell, None] = {}
    kinds = cycle(kind for kind in STORAGES if not METHODS["lora"].storage_fault(kind))
    for family in SHAPES:
        for method in METHODS:
            found[family, method, _usual(method)] = None
        for kind in islice(kinds, 3):
            found[family, "lora", kind] = None
    for method in ("lora", "normbiaslora", "qst_side", "qsft"):
        for kind in STORAGES:
            if not METHODS[method].storage_fault(kind):
                found["llama", method, kind] = None
    found["llama", "lora", None] = None
    return [cell for cell in found if cell[1] != MOVING]


def _usual(method: str) -> str | None:
    """The storage that a method is mostly used with."""
    return next((kind for kind in ("nf4", "int2_g64") if not METHODS[method].storage_fault(kind)), None)


def few_cells() -> list[Cell]:
    """For a rehearsal: every family and every method once."""
    methods = cycle(name for name in METHODS if name != MOVING)
    return [(family, method, _usual(method)) for family, method in zip(SHAPES, methods, strict=False)]


@check(50)
def gradients(ground: Ground, found: Findings) -> None:
    """Loss and gradients of a step, in fp32 and in bf16, beside those of the same numbers in float64 on the CPU."""
    chosen = few_cells() if ground.tiny else cells()
    found.figures["cells"] = len(chosen)
    for cell in chosen:
        with found.case(" ".join(map(str, cell))):
            reference, loss = gradients_of(cell, torch.float64, Layout())
            for dtype, allowed in TOLERANCE.items():
                what = f"{' '.join(map(str, cell))} {dtype}"
                mine, own_loss = gradients_of(cell, dtype, ground.layout)
                coarse = cell[1] == "qst_8bit" or cell[2] == "llm_int8"
                allowed = max(allowed, COARSE) if coarse else allowed
                if cell[1] == "qst_released" and dtype == torch.bfloat16:  # heads of two channels
                    allowed = COARSEST
                near = abs(own_loss - loss) <= allowed * abs(loss)
                found.expect(near, f"{what}: the loss is {own_loss}, not {loss}")
                found.expect(mine.keys() == reference.keys(), f"{what}: other parameters have a gradient")
                whole = [torch.cat([part[name].flatten() for name in reference]) for part in (mine, reference)]
                found.close(what, *whole, allowed)


def gradients_of(cell: Cell, dtype: torch.dtype, layout: Layout) -> tuple[dict[str, Tensor], float]:
    """(gradient of each trained parameter in float64 on the CPU, the loss) of a step on `layout`'s device."""
    decoder, attachment = built(cell, dtype)
    decoder.to(layout.device)
    model = MetaModel(decoder, None, 64).train()
    batch = _batch(decoder.args.vocab_size).to(layout.device)
    loss = model(batch) / batch.supervised
    loss.backward()
    named = dict(decoder.named_parameters())
    found = {name: named[name].grad for name in sorted(attachment.trainable) if named[name].grad is not None}
    return {name: gradient.detach().cpu().double() for name, gradient in found.items()}, float(loss.detach())


def built(cell: Cell, dtype: torch.dtype) -> tuple[Decoder, Attachment]:
    """A model on the CPU with a method on it; its numbers are in bf16 whatever `dtype` is, and so are the same."""
    family, name, kind = cell
    method = METHODS[name]
    storing = method.storage_of(storage(kind)) if kind else None
    decoder = method.decoder(ModelArgs(**SIZE | SHAPES[family]), dtype=dtype, storage=storing)
    attachment = method.attach(decoder)
    method.prepare_training(decoder, attachment)
    initial = {target.name: _starting(target.name, target.whole_shape(1)) for target in targets(decoder)}
    filled = Attachment(attachment.trainable, initial)
    fill(decoder, {}, filled, Layout(), DataParallel(Layout(), "sdp", method.trains_base))
    return decoder, attachment


def _starting(name: str, shape: tuple[int, ...]) -> Callable[[torch.Generator], Tensor]:
    """Normal numbers; those of norms, gates and scales lie about one."""

    def make(generator: torch.Generator) -> Tensor:
        """Of the shape."""
        numbers = torch.randn(shape, generator=generator)
        around_one = len(shape) < 2 and name.endswith(("weight", "scale"))
        return (numbers * 0.2 + 1 if around_one else numbers * 0.08).bfloat16().float()

    return make


def _batch(vocabulary: int) -> PackedBatch:
    """Documents of `LENGTHS` tokens, the first third of which is not learned."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (sum(LENGTHS),), generator=generator)
    labels = torch.randint(vocabulary, (sum(LENGTHS),), generator=generator)
    labels[: sum(LENGTHS) // 3] = IGNORE
    return PackedBatch(tokens, labels, LENGTHS, (0, 1, 2), (0, 0, 0))


def training(**changes: object) -> Training:
    """Random documents and weights, of a shape that `tools/benchmark.py` knows."""
    plain = {
        "model": "tiny", "data": None, "steps": 6, "batch_size": 2, "seq": (64,), "supervised": 1.0, "max_words": 64,
        "method": "lora", "rank": None, "adapter": None, "quant_type": "nf4", "precision": "bf16", "lr": 1e-3,
        "optim": "adamw", "checkpointing": "none", "share_prefixes": True,
    }  # fmt: skip
    return Training(**plain | changes)


@check(10)
def steps(ground: Ground, found: Findings) -> None:
    """Six steps of the engine, of every method, optimizer and precision: losses are finite, and fall on one batch."""
    runs = [{"method": name, "quant_type": _usual(name)} for name in METHODS]
    runs += [{"optim": "adamw8bit"}, {"optim": "paged_adamw"}, {"precision": "fp16"}, {"precision": "fp32"}]
    runs += [{"checkpointing": "all"}, {"quant_type": "llm_int8"}, {"method": "full", "quant_type": None}]
    for changes in runs[-7::3] if ground.tiny else runs:
        with found.case(str(changes)), TemporaryDirectory() as folder:
            odd = Path(folder, "odd.json")  # a vocabulary that no kernel likes
            odd.write_text(json.dumps(SIZES["tiny"] | {"vocab_size": 515}))
            changes = {"model": str(odd)} | changes
            engine = training(**{"lr": 1e-2} | changes).engine(ground.layout)
            engine.settings = replace(engine.settings, pin_memory=ground.cuda)
            engine.model.train()
            progress = Progress()
            losses = []
            for _ in range(6):
                report, _ = engine.step(progress)
                losses.append(report.loss)
                progress = replace(progress, epoch=0, step=0)
            found.expect(all(map(math.isfinite, losses)), f"{changes}: losses {losses}")
            found.expect(losses[-1] < losses[0], f"{changes}: on one batch, losses go from {losses[0]} to {losses[-1]}")


@check(12, needs_cuda=True)
def plan(ground: Ground, found: Findings) -> None:
    """A step's highest allocation beside the plan of it; a shape of 1.1B, 2,048 tokens."""
    shape, tokens = ground.pick("1.1B", "tiny"), ground.pick(2048, 64)
    for method, checkpointing, optim in (
        ("lora", 0, "adamw"), ("lora", "all", "adamw"), ("normbias", 0, "adamw8bit"), ("qst", 0, "adamw"),
        ("full", "all", "adamw"),
    ):  # fmt: skip
        with found.case(what := f"{method}, checkpointing {checkpointing}, {optim}"):
            kind = _usual(method)
            run = training(
                model=shape, method=method, quant_type=kind, batch_size=1, seq=(tokens,), optim=optim,
                checkpointing=checkpointing, max_words=tokens,
            )  # fmt: skip
            before = begin_peak(ground.device)
            engine = run.engine(ground.layout)
            engine.model.train()
            progress = Progress()
            engine.step(progress)
            synchronize(ground.device)
            again = begin_peak(ground.device)
            engine.step(progress)
            peak = peak_bytes(ground.device) - before
            layers = sum(1 for _ in engine.model.llma.blocks()) if checkpointing == "all" else 0
            setting = Setting(method, kind or "none", seq=tokens, checkpointing=layers, optim=optim)
            total = planned(shape, setting, ground.device)[0].total
            found.figures[what] = {
                "planned_gb": round(total / 1e9, 3), "peak_gb": round(peak / 1e9, 3),
                "held_gb": round((again - before) / 1e9, 3),
            }  # fmt: skip
            if ground.cuda:
                # cuBLAS takes up to 32 MiB of PyTorch's memory for itself, and blocks are rounded to 512 bytes.
                most = 1.02 * total + (64 << 20)
                found.expect(peak <= most, f"{what}: {peak / 1e9:.3f} GB were allocated, {total / 1e9:.3f} planned")
                found.expect(peak >= 0.8 * total, f"{what}: only {peak / 1e9:.3f} GB of {total / 1e9:.3f} were needed")
            del engine


CHECKS = [gradients, steps, plan]
