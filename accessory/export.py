"""Makes checkpoints from checkpoints: converts, merges trained parts, exports adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.blueprint import DTYPES, Blueprint, make_blueprint
from accessory.checkpoint.formats.gguf_writing import write_gguf
from accessory.checkpoint.formats.hugging_face_writing import LAYOUTS, WHOLE, laid_out, write_hugging_face
from accessory.checkpoint.formats.own import write_own
from accessory.checkpoint.formats.peft_writing import write_adapter
from accessory.checkpoint.formats.qst_writing import published_config, write_qst
from accessory.checkpoint.formats.torch_writing import write_torch_shards
from accessory.checkpoint.lazy import HeldTensor
from accessory.checkpoint.load import named_generator, overlay, resolve
from accessory.checkpoint.merge import merged, repacked, unpacked, with_trained_parts
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.run_record import trained_prompt_layouts, trained_system, trained_tokens, with_base
from accessory.checkpoint.source import STRATEGY_FILE, Source, model_args_of, read_json
from accessory.checkpoint.strategy import storages_of_mix
from accessory.checkpoint.whole import WholeModel, refuse_existing
from accessory.data.templates import CHAT
from accessory.errors import CheckpointError, ConfigError, check_known
from accessory.meta import MetaModel
from accessory.method.side_tuning import SideTuning
from accessory.model.families import architecture_of
from accessory.parallel import groups
from accessory.parallel.agree import on_main
from accessory.parallel.groups import Layout, data_parallel_group
from accessory.quant import MIXES, STORAGES, storage
from accessory.quant.groups import group_storage
from accessory.quantizer.calibration import calibration_rows
from accessory.quantizer.folder import Folder
from accessory.quantizer.job import Quantization, identity_of
from accessory.quantizer.own_text import own_rows
from accessory.quantizer.settings import HELD, Settings
from accessory.quantizer.strategy import NARROW, WIDE, Width, strategy_document, widths_of
from accessory.run.lock import claim_directory
from accessory.tokenizer.opening import holds_tokenizer, open_tokenizer

FORMATS = ("accessory", *LAYOUTS, "gguf", "meta", "upstream")
PROBE_QUESTION = "Explain in a few sentences why the sky looks blue during the day and red at sunset."
PROBE_ANSWER = (
    "Sunlight holds all colours. Air scatters short waves more than long ones, so that blue light reaches "
    "the eye from all over the sky; in the evening the light comes a longer way, and mostly red is left of it."
)
PROBE_TOKENS = 256  # the most, since the logits of all are held at once


@dataclass(frozen=True)
class Destination:
    """How to write a model.

    to: one of `FORMATS`. dtype: of plain weights. gguf_type: f32, f16, bf16, q8_0 or packed. ranks: shards of a .pth
    checkpoint. architecture: the model type to write it as, where that is not its own. quant_type: pack the linears.
    """

    to: str = "accessory"
    dtype: str = "bf16"
    gguf_type: str = "f16"
    ranks: int = 1
    architecture: str | None = None
    quant_type: str | None = None

    def __post_init__(self) -> None:
        check_known("--to", self.to, FORMATS)
        check_known("--dtype", self.dtype, DTYPES)
        if not (isinstance(self.ranks, int) and self.ranks > 0):
            raise ConfigError(f"--model_parallel_size {self.ranks!r} is not a number of shards.")
        if self.quant_type:
            self.refuse_packed()
        if self.quant_type in MIXES:
            raise ConfigError(
                f"--quant_type {self.quant_type}: which linears have 4 bits is measured: give --calibrate DATA, or one "
                f"of {', '.join(STORAGES)}."
            )

    def refuse_packed(self) -> None:
        """Raise `ConfigError` for a format that has no packed weights."""
        if self.to not in ("accessory", *LAYOUTS):
            raise ConfigError(f"--to {self.to}: packed weights are written as accessory, {', '.join(LAYOUTS)}.")

    def check_calibrated(self, model: WholeModel, target: Path, quant_type: str) -> None:
        """Raise `AccessoryError`s where `model` could not be written here once it is quantized by text.

        No weight is read. The check comes first because quantizing by text takes long.
        """
        if self.to == "accessory":
            return
        if self.to not in WHOLE:
            raise ConfigError(
                f"--to {self.to}: with --calibrate it is accessory, {' or '.join(WHOLE)}; tools/convert.py writes other"
                " formats of accessory's."
            )
        width = widths_of(quant_type)
        for bits, group in (NARROW, WIDE) if width is None else (width,):
            kind = group_storage(bits, group, ("points",))
            storages = {name.removesuffix(".weight"): kind for name in model.tensors}
            packed = replace(model, tensors=repacked(model.tensors, kind.name, storages=storages))
            laid_out(packed, target, DTYPES[self.dtype], None, self.to)

    def write(self, model: WholeModel, target: Path) -> None:
        """Write `model` to `target`, which must not be there yet. Raises `CheckpointError`."""
        if model.vision and self.to != "accessory":
            raise ConfigError(
                f"--to {self.to} has no place for the image encoder ({model.vision.name}): write it with --to "
                "accessory, or the model without it with --no_visual."
            )
        if self.to == "gguf" and target.suffix != ".gguf":
            raise ConfigError(f"{target}: a GGUF file is recognised by its name; give one that ends in .gguf.")
        if self.architecture:
            architecture_of(self.architecture, "--architecture")
            model = replace(model, args=model.args.model_copy(update={"architecture": self.architecture}))
        dtype = DTYPES[self.dtype]
        if self.to == "accessory":
            write_own(model, target, dtype, self.quant_type)
        elif self.to in LAYOUTS:
            write_hugging_face(model, target, dtype, self.quant_type, self.to)
        elif self.to == "gguf":
            write_gguf(model, target, self.gguf_type)
        else:
            write_torch_shards(model, target, dtype, self.to, self.ranks)


def transformers_hint(path: Path) -> str | None:
    """What transformers needs to open a Hugging Face directory of a type it does not know; None if it does know."""
    config = read_json(path / "config.json")
    name = config.get("model_type")
    if architecture_of(name, str(path)).native or "auto_map" in config:
        return None
    return (
        f"transformers knows no {name} of its own and cannot open {path} as it is: put the published model's "
        "modeling_*.py, configuration_*.py and its config.json's auto_map there, or write it with --architecture llama"
    )


@dataclass(frozen=True)
class LogitError:
    """How much two models' logits [T, V] of a probe text differ; at `changed` of `tokens` their argmax does."""

    largest: float
    mean: float
    changed: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"logits differ by {self.largest:.4f} at most and {self.mean:.5f} on average over {self.tokens} probe "
            f"tokens; the likeliest next token is another at {self.changed} of them"
        )


def open_whole(
    paths: list[Path],
    llama_config: Sequence[Path] = (),
    tokenizer_path: Path | None = None,
    no_visual: bool = False,
) -> tuple[WholeModel, list[Source], Blueprint]:
    """Base and, where given, trained parts, as they lie; checked to be a complete model that fits together.

    A tokenizer given with tokenizer_path gets the tokens that the parts' runs added. no_visual: leave out the encoder.
    """
    sources = with_base(list(paths), no_visual=no_visual)
    blueprint = make_blueprint(
        sources,
        llama_config=llama_config,
        tokenizer_path=tokenizer_path,
        precision="bf16",
        train=False,
        new_tokens=trained_tokens(sources) if tokenizer_path else (),
        no_visual=no_visual,
    )
    decoder, attachment = blueprint.build(Layout())
    resolve(decoder, sources, attachment, initialize=False)  # refuses what is not a whole model
    tensors, _ = overlay(sources, blueprint.args)
    layouts, system = trained_prompt_layouts(sources), trained_system(sources)
    model = WholeModel(blueprint.args, tensors, blueprint.tokenizer, layouts, system, blueprint.vision)
    return model, sources, blueprint


def open_base(paths: list[Path], **reading) -> tuple[WholeModel, list[Source]]:
    """`open_whole` of a base alone. Raises `CheckpointError` if biases or LoRA were trained beside it."""
    model, sources, blueprint = open_whole(paths, **reading)
    if any(source.is_delta and not (source.is_difference or source.is_vision) for source in sources):
        raise CheckpointError(f"{paths[-1]}: is a trained part; merge it (tools/merge.py), or write it with --to peft.")
    if not blueprint.method.trains_base:
        raise CheckpointError(
            f"{paths[-1]}: holds what was trained beside its base (it is a {blueprint.llama_type}); merge it "
            "(tools/merge.py)."
        )
    return model, sources


def convert(paths: list[Path], target: Path, destination: Destination, **reading) -> WholeModel:
    """Write a base as another format; returns what was written. Raises `CheckpointError`."""
    model, _ = open_base(paths, **reading)
    destination.write(model, target)
    return model


def calibrated(
    model: WholeModel,
    base: Path,
    target: Path,
    data: Path,
    settings: Settings,
    destination: Destination,
    layout: Layout,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write `model`, which `base` holds, with linears quantized by the text in `data`; returns all figures.

    Finished parts lie beside `target` until the whole is written, so that a stopped run can go on from them.
    destination: accessory, or gptq or awq, for which zero points are whole. A collective. Raises `AccessoryError`s, of
    another quantization that is at work for `target`, too.
    """
    refuse_existing(target)
    settings.check(layout.dp_size)
    if model.vision:
        raise ConfigError(
            f"--calibrate: {base} has an image encoder, and the text tells nothing of the images it is to see. Leave "
            "out --calibrate, or write the model without it: tools/convert.py SOURCE TARGET --no_visual."
        )
    destination.check_calibrated(model, target, settings.quant_type)
    if destination.to in WHOLE:
        settings = replace(settings, whole_points=True)
        say(f"--to {destination.to}: zero points are whole, as its files have them; codes and scales are trained.")
    ids = calibration_rows(data, model.tokenizer, settings.row_tokens, settings.rows + HELD, settings.seed)
    folder = Folder(target.with_name(f".{target.name}.quantizing"), layout.rank, data_parallel_group())
    with ExitStack() as held:
        on_main(claim_directory, folder.path, held, "TARGET")
        packed, widths, figures = _fitted(model, base, ids, settings, folder, layout, say)
        if layout.is_main:
            if destination.to == "accessory":
                documents = {STRATEGY_FILE: strategy_document(widths)}
                write_own(packed, target, DTYPES[destination.dtype], documents=documents)
            else:
                destination.write(packed, target)
        folder.discard()
    return {"base": str(base), "target": str(target), "quant_type": settings.quant_type} | figures


def _fitted(
    model: WholeModel,
    base: Path,
    ids: Tensor,
    settings: Settings,
    folder: Folder,
    layout: Layout,
    say: Callable[[str], None],
) -> tuple[WholeModel, dict[str, Width], dict[str, Any]]:
    """`model` with linears quantized by `ids` [R, S] and text of its own: see `Quantization.run`."""
    precision = torch.bfloat16
    folder.open(identity_of(settings, ids, open_source(base).fingerprint(), precision, layout.dp_size))
    if settings.own_rows:
        many = settings.own_rows, settings.row_tokens, settings.seed
        own = own_rows(model, *many, folder, dtype=precision, layout=layout, say=say)
        ids = torch.cat([ids[: settings.rows], own, ids[settings.rows :]])
    return Quantization(model, ids, settings, folder, dtype=precision, layout=layout, say=say).run()


def merge(
    paths: list[Path], target: Path, destination: Destination, *, base: str | None, drop_biases: bool, **reading
) -> str:
    """Write base and trained part, read as `open_whole` does, as one model; returns the `base` that was used.

    base: "full" adds the part to the weights in the base's files, "dequantized" to these weights packed and unpacked
    again; "packed" leaves them packed, beside norms and biases; None takes the base that training saw.
    Raises `CheckpointError`.
    """
    model, sources, blueprint = open_whole(paths, **reading)
    if fault := blueprint.method.merge_fault:
        raise CheckpointError(f"{paths[-1]}: cannot be merged: it is a {blueprint.llama_type}, {fault}.")
    quantization = trained_quantization(sources)
    base = base or ("dequantized" if quantization else "full")
    tensors = model.tensors
    if base not in ("full", "dequantized", "packed"):
        raise ConfigError(f"--base {base!r} is neither full, dequantized nor packed.")
    packed = next((source.path for source in sources if source.storage), None)
    if base == "full" and packed:
        raise CheckpointError(f"{packed}: is a quantized base: its full weights are gone. Leave out --base full.")
    storage_of = blueprint.method.storage_of
    if base == "full" and quantization and blueprint.method.tunes(storage(quantization)):
        raise CheckpointError(f"{paths[-1]}: trained parts of {quantization} weights. Leave out --base full.")
    if base != "full" and quantization is None:
        raise CheckpointError(f"{paths[-1]}: was not trained on a quantized base; leave out --base {base}.")
    for part, endings in {"LoRA": ".lora_a.weight", "scales": ".scale"}.items():
        if base == "packed" and any(name.endswith(endings) for name in tensors):
            raise CheckpointError(
                f"{paths[-1]}: has {part}, which packed weights cannot take up. Leave out --base packed."
            )
    if base == "packed":
        destination.refuse_packed()
    if base != "full":
        again = {} if packed else {"is_linear": blueprint.packed_as(quantization).__contains__}
        again |= {"storages": storages_of_mix(sources, quantization)} if quantization in MIXES and not packed else {}
        tensors = tensors if packed else repacked(tensors, quantization, **again)
        tensors = with_trained_parts(tensors, storage_of, rounded=base == "packed")
    if base == "dequantized":
        tensors = unpacked(tensors)
    args, tensors = merged(tensors, model.args, blueprint.method.mergeable, drop_biases=drop_biases)
    destination.write(replace(model, args=args, tensors=tensors), target)
    return base


def export_adapter(
    paths: list[Path], target: Path, *, drop_biases: bool, base_name: str | None = None, **reading
) -> str | None:
    """Write what was trained as one PEFT adapter of its base; returns a remark for the user, or None.

    Several parts were each trained on those before them, and hold whole values, not differences: of a tensor in several
    parts the last one counts. base_name: the base's name in the adapter's config; absent: its path. Raises
    `CheckpointError`.
    """
    _, sources, blueprint = open_whole(paths, **reading)
    base, *parts = sources
    if blueprint.vision:
        raise ConfigError(
            f"--to peft has no place for what was trained behind the image encoder ({blueprint.vision.name}): give "
            "--no_visual to write the rest."
        )
    fault = blueprint.method.adapter_fault
    if fault or not parts or not all(part.is_delta for part in parts):
        found = ", ".join(f"{source.path} ({source.format})" for source in sources)
        why = f": it is a {blueprint.llama_type}, {fault}" if fault else ""
        raise CheckpointError(f"Expected a base and what was trained on it to write an adapter of; found {found}{why}.")
    if differences := [source.path for source in sources if source.is_difference]:
        raise CheckpointError(
            f"{differences[0]}: is the difference of two models; PEFT has no place for one. Write it with its base as "
            "one model first: tools/convert.py BASE DIFFERENCE TARGET."
        )
    args = model_args_of(base) or blueprint.args
    tensors, _ = overlay(parts, args)
    settings = (parts[-1].settings or {}) | {"rotary_layout": args.rotary_layout}
    write_adapter(
        replace(parts[-1], tensors=tensors, settings=settings),
        args,
        blueprint.method.mergeable,
        target,
        base_path=base_name or str(base.path.resolve()),
        drop_biases=drop_biases,
    )
    if base_name:
        return None
    if base.format == "Hugging Face":
        return transformers_hint(base.path)
    return (
        f"adapter_config.json names the base {base.path}, which transformers cannot open as it is ({base.format}): "
        "write it with --to hf, and give that directory or a Hub name with --base_model"
    )


def export_side(paths: list[Path], target: Path, **reading) -> str:
    """Write a trained side network as the published QST code does; returns how to make its model, for the user.

    Raises `CheckpointError` for anything else, and for settings that the published form cannot express.
    """
    _, sources, blueprint = open_whole(paths, **reading)
    base, *parts = sources
    if not (isinstance(blueprint.method, SideTuning) and parts and all(part.is_delta for part in parts)):
        raise CheckpointError(
            f"{paths[-1]}: is a {blueprint.llama_type}; --to qst writes a side network, trained by a --llama_type that "
            f"ends in {SideTuning.suffix}."
        )
    tensors, _ = overlay(parts, blueprint.args)
    _, attachment = blueprint.build(Layout())
    frozen = {name: HeldTensor(start(named_generator(0, name))) for name, start in attachment.initial.items()}
    tensors = frozen | tensors  # the published code saves what it never trains, too
    write_qst(tensors, blueprint.args, blueprint.method.settings, target, paths[-1])
    config = published_config(blueprint.method.settings)
    return f"the published code loads it into a model made beside {base.path} with {config}"


def asking_hint(paths: list[Path], target: Path, to: str) -> str | None:
    """The prompt layout to ask `target` in, made of `paths`; None if `to` records it, or it is asked so anyway."""
    layouts = trained_prompt_layouts(with_base(list(paths)))
    system = trained_system(with_base(list(paths)))
    if not layouts or to == "accessory" or (layouts[0] == _own_layout(target) and not system):
        return None
    words = f", after the system's words {system!r}" if system else ""
    return f"trained on questions laid out as {layouts[0]}: ask it with --system_prompt {layouts[0]}{words}"


def _own_layout(target: Path) -> str:
    """The layout in which a model is asked that records none: its chat template, or alpaca where it has none."""
    has_tokenizer = target.is_file() or holds_tokenizer(target)
    return CHAT if has_tokenizer and open_tokenizer(target).chat_template is not None else "alpaca"


def trained_quantization(sources: list[Source]) -> str | None:
    """The storage format that the trained part was trained beside; None for plain weights."""
    packed = next((source.storage for source in sources if source.storage), None)
    return packed or next((source.run["quantization"] for source in reversed(sources) if source.run), None)


def logit_error(
    trained: list[Path], written: Path, probe: str | None = None, precision: str = "bf16", **reading
) -> LogitError:
    """Compare the model as trained, read with `reading` (llama_config, tokenizer_path), with the written one.

    probe: a text; None: a question and its answer in the layout of the training data. It is cut to `PROBE_TOKENS` and
    to the longest document of the model. Raises `ConfigError`.
    """
    check_known("--precision", precision, DTYPES)
    layout = groups.start("cpu")
    seeing = None if not reading.pop("no_visual", False) else False
    model = MetaModel.from_pretrained(list(trained), dtype=precision, layout=layout, with_visual=seeing, **reading)
    tokens = _probe_tokens(model, probe)
    first = model.logits(tokens, (len(tokens),))
    del model
    second = MetaModel.from_pretrained(written, dtype=precision, layout=layout).logits(tokens, (len(tokens),))
    shared = min(first.shape[1], second.shape[1])  # one of them may pad its vocabulary
    first, second = first[:, :shared], second[:, :shared]
    difference = (first - second).abs()
    changed = int((first.argmax(-1) != second.argmax(-1)).sum())
    return LogitError(float(difference.max()), float(difference.mean()), changed, len(tokens))


def _probe_tokens(model: MetaModel, probe: str | None) -> torch.Tensor:
    if probe is None:
        ids = model.prompt_tokens(model.question(PROBE_QUESTION))
        ids += model.tokenizer.encode(PROBE_ANSWER, continuation=True)
    else:
        ids = [*model.tokenizer.start_ids, *model.tokenizer.encode(probe)]
    if not ids:
        raise ConfigError("--probe '' has no tokens to compare the logits of.")
    return torch.tensor(ids[: min(PROBE_TOKENS, model.max_seq_len)], dtype=torch.int64)
