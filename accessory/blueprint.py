"""What to build, worked out from flags and files before any weight is read: family, method, settings, storage."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from pydantic import ValidationError

from accessory.checkpoint.lazy import PackedTensor
from accessory.checkpoint.naming import BLOCK_LINEAR
from accessory.checkpoint.source import STRATEGY_FILE, Source, read_json, settings_read_by
from accessory.checkpoint.strategy import storages_of_mix
from accessory.checkpoint.vision_part import UNNAMED, named_with_encoder, vision_among
from accessory.errors import CheckpointError, ConfigError, TokenizerError, explain_validation, nearest
from accessory.foreign_names import unknown
from accessory.method import METHODS, QUANT_TARGETS, Attachment, Method, setting_names
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.model.families import ARCHITECTURES, FAMILIES, architecture_of
from accessory.model.linear import Linear
from accessory.parallel.groups import Layout
from accessory.quant import MIXES, STORAGES, PackedWeight, storage
from accessory.tokenizer import StatedTokenizer, Tokenizer, holds_tokenizer, open_tokenizer
from accessory.vision import VISIONS, Vision

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
_FAMILY_OF = (
    {name: architecture.family for name, architecture in ARCHITECTURES.items()}
    | {family: family for family in FAMILIES}
    | dict.fromkeys(("qwen", "smollm", "tinyllama", "vicuna", "alpaca", "yi"), "llama")
    | {"pythia": "neox", "gptneox": "neox", "bloomz": "bloom"}
)
"""Name of a model -> its family, the first part of --llama_type."""
_THEIR_KEYS = {
    their: ours
    for architecture in ARCHITECTURES.values()
    for ours, theirs in architecture.keys.items()
    for their in theirs.split("|")
}
"""Key of Hugging Face's config.json -> ours."""
_SEEING = ("llama",)
"""Families whose models may see images."""
_OF_ENCODERS = {name: storage(name) for name in ("nf4", "nf4_single", "fp4", "fp4_single", "int8")}
"""Storages that an image encoder has, too, where the blocks have them. With others it has nf4: codes in groups are
chosen by data or trained, and whole numbers of activations are rounded, which its wide ones do not stand."""
SLACK_ROWS = 1024  # embedding rows beyond the tokenizer's, or tokens beyond the embedding's, that may belong together


@dataclass(frozen=True)
class Blueprint:
    """A model that can be built. `quant_type` None: plain weights in `dtype`. `train` False: one only to be asked.

    plain: linears that stay plain in a base which is packed already; storages: linear -> how it is packed, of those for
    which `quant_type` does not say so. notes: lines for the log. quant_targets: as the flag; empty: all linears of the
    blocks are packed. vision: what turns images into rows; None: it reads tokens alone.
    """

    llama_type: str
    args: ModelArgs
    method: Method
    quant_type: str | None
    dtype: torch.dtype
    tokenizer: Tokenizer
    train: bool
    plain: frozenset[str] = frozenset()
    storages: Mapping[str, type[PackedWeight]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    quant_targets: tuple[str, ...] = ()
    vision: Vision | None = None

    def build(self, layout: Layout, data_parallel: str = "sdp") -> tuple[Decoder, Attachment]:
        """The decoder on the meta device, this rank's share of it, with the method attached.

        Raises an `AccessoryError` where the method refuses the base or the layout.
        """
        self.method.check(self.args, layout, data_parallel)
        if self.quant_type in MIXES and not self.storages:
            raise ConfigError(
                f"--quant_type {self.quant_type}: a model without a base has no {STRATEGY_FILE}, which says which "
                f"linears have 4 bits; expected one of {', '.join(STORAGES)}."
            )
        maker = self.method.storage_of(storage(self.quant_type)) if self.quant_type else None
        decoder = self.method.decoder(
            self.args, dtype=self.dtype, rank=layout.mp_rank, ranks=layout.mp_size, storage=maker
        )
        keep_packed(decoder, {name: self.method.storage_of(kind) for name, kind in self.storages.items()}, maker)
        for name in self.plain | self._untargeted(decoder):
            decoder.get_submodule(name).keep_plain(self.dtype)
        # A fully trained model that is only asked needs no fp32 masters: it is a base like any other.
        attach = self.train or not self.method.trains_base
        attachment = self.method.attach(decoder) if attach else Attachment()
        if self.vision:
            attach_vision(self.vision, decoder, attachment, self.method if attach else None, self.quant_type)
        if self.train:
            self.method.prepare_training(decoder, attachment)
        return decoder, attachment

    def _untargeted(self, decoder: Decoder) -> set[str]:
        """Names of the linears that `quant_targets` leaves plain. Raises `ConfigError` where it leaves all so."""
        if not (self.quant_targets and self.quant_type):
            return set()
        packed = {name: linear for name, linear in decoder.named_modules()
                  if isinstance(linear, Linear) and isinstance(linear.weight, PackedWeight)}  # fmt: skip
        found = set()
        for name, linear in packed.items():
            with_lora = linear.lora_a is not None or self.method.has_lora(name)
            if not {name.rsplit(".", 1)[-1], "lora" if with_lora else "frozen"}.intersection(self.quant_targets):
                found.add(name)
        if found == packed.keys():
            raise ConfigError(
                f"--quant_targets {' '.join(self.quant_targets)}: no linear of the model is one of these."
            )
        return found

    def packed_as(self, quant_type: str) -> set[str]:
        """Names of the matrices that are packed where the base is packed as `quant_type` when it is loaded."""
        decoder, _ = replace(self, quant_type=storage(quant_type).name).build(Layout())
        return {name for name, module in decoder.named_modules() if isinstance(module, PackedWeight)}

    def settings(self) -> dict[str, Any]:
        """Model and method settings in one, as a checkpoint's `config.json` holds them."""
        vision = {self.vision.key: self.vision.settings.model_dump()} if self.vision else {}
        return {**self.args.model_dump(), **self.method.settings.model_dump(), **vision}


def attach_vision(
    vision: Vision, decoder: Decoder, attachment: Attachment, method: Method | None, quant_type: str | None
) -> None:
    """Add the encoder, frozen, packed if the blocks are, and what is behind it; what `method` trains of that is fp32.

    method: None: it is only asked.
    """
    kind = _OF_ENCODERS.get(quant_type, storage("nf4")) if quant_type else None
    for name, start in vision.attach(decoder, decoder.dtype, kind).items():
        parameter = decoder.get_parameter(name)
        if method and method.trains_of_vision(name, parameter):
            parameter.data = parameter.data.float()
            attachment.trainable.add(name)
            attachment.initial[name] = start


def make_blueprint(
    sources: list[Source],
    *,
    precision: str,
    train: bool,
    llama_type: str | None = None,
    llama_config: Sequence[Path | Mapping[str, Any]] = (),
    tokenizer_path: Path | None = None,
    quant_type: str | None = None,
    quant: bool = False,
    quant_targets: Sequence[str] = (),
    new_tokens: Sequence[str] = (),
    no_visual: bool = False,
    flag_settings: Mapping[str, tuple[str, Any]] = MappingProxyType({}),
    opener: Callable[[Path], StatedTokenizer] = open_tokenizer,
) -> Blueprint:
    """Work out what to build. What no argument states is taken from the sources; the last one that states it counts.
    Without sources it is a new model, whose settings and tokenizer arguments state.

    llama_config: files of settings, or settings themselves. quant: keep the base packed; quant_type: in which format,
    nf4 where neither it nor a packed base says; quant_targets: of which linears, as the flag, or as a run recorded it.
    new_tokens: tokens to add to the vocabulary. no_visual: whether an image encoder is left out. flag_settings: the
    method's settings that flags state, key -> (flag, value). opener: reads the tokenizer at a path.

    Raises `ConfigError` for unknown types, unknown keys, and combinations that cannot work, `TokenizerError` for a
    missing or foreign tokenizer.
    """
    llama_type = llama_type or next((s.llama_type for s in reversed(sources) if s.llama_type), "llama")
    family, named, method_class = _named(llama_type)
    vision = None if no_visual else _vision(sources, llama_type, family, named, method_class)
    packed = packed_linears(sources, quant_type)
    quant_type = _storage(sources, quant, quant_type, packed, method_class)
    if quant_type and train and (fault := method_class.storage_fault(quant_type)):
        others = [family + method.suffix for method in METHODS.values() if not method.storage_fault(quant_type)]
        raise ConfigError(f"--quant with --llama_type {llama_type}: {fault}; use --llama_type {' or '.join(others)}.")
    args, method = _settings(sources, llama_config, method_class, flag_settings)
    vision = vision and method.sees(vision)
    _check_family(llama_type, family, method_class, args, new=not sources)
    _check_blocks(args, sources)
    tokenizer = _tokenizer(sources, tokenizer_path, opener)
    tokenizer = tokenizer.with_added_tokens(new_tokens) if new_tokens else tokenizer
    args, note = _with_vocabulary(args, sources, tokenizer)
    if args.vocab_size > _embedding_rows(sources, args) and train and not method.trains_vocabulary:
        note += ("nothing trains those rows: set vocabulary_tuning in --llama_config to have them learned",)
    if train:
        note += tuple(f"{source.path}: {said}" for source in sources for said in (*source.notes, *_unread(source)))
    plain = plain_linears(sources)
    packed = packed or (storages_of_mix(sources, quant_type) if quant_type in MIXES else {})
    aimed = _quant_targets(sources, quant_targets)
    return Blueprint(
        llama_type, args, method, quant_type, DTYPES[precision], tokenizer, train, plain, packed, note, aimed, vision
    )


def _storage(
    sources: list[Source],
    quant: bool,
    asked: str | None,
    packed: Mapping[str, type[PackedWeight]],
    method: type[Method],
) -> str | None:
    """The storage format: the first that the base is packed in already, else the one asked for."""
    if packed:
        return next(iter(packed.values())).name
    # Parts of packed weights that were trained are of no use without the rest of them.
    recorded = [s.run["quantization"] for s in sources if s.is_delta and s.run and s.run["quantization"]]
    trained = next((name for name in reversed(recorded) if method.tunes(storage(name))), None)
    return asked or trained or ("nf4" if quant else None)


def packed_linears(sources: list[Source], asked: str | None = None) -> dict[str, type[PackedWeight]]:
    """Linear -> its storage, of a base that is packed already; asked: `--quant_type`, or None.

    Raises `ConfigError` where none of its matrices is packed as that is.
    """
    base = next((source for source in sources if source.storage), None)
    kinds = {} if base is None else {name: kind for name, kind in base.storages.items() if BLOCK_LINEAR.fullmatch(name)}
    used = {name: storage(asked).used_for(kind) if asked else kind for name, kind in kinds.items()}
    if kinds and not any(used.values()):
        raise ConfigError(
            f"--quant_type {asked}: {base.path} is packed as {base.storage_names} already, and packing it again would "
            "lose more. Leave --quant_type out, or give the full-precision checkpoint."
        )
    return {name.removesuffix(".weight"): used[name] or kind for name, kind in kinds.items()}


def keep_packed(decoder: Decoder, packed: Mapping[str, type[PackedWeight]], default: type[PackedWeight] | None) -> None:
    """Have the linears of `decoder` packed as `packed` says, where that is not the `default` they were made with."""
    for name, kind in packed.items():
        if kind is not default:
            decoder.get_submodule(name).keep_packed(kind)


def _quant_targets(sources: list[Source], asked: Sequence[str]) -> tuple[str, ...]:
    """Those asked for, else those of the run that trained the last part; none for a base that is packed already."""
    packed = next((source.path for source in sources if source.storage), None)
    if packed and asked:
        raise ConfigError(f"--quant_targets {' '.join(asked)}: {packed} is packed already, and says what lies plain.")
    run = next((source for source in reversed(sources) if source.run), None)
    if packed or asked or run is None:
        return tuple(asked)
    recorded = run.run.get("arguments", {}).get("quant_targets") or []
    if not isinstance(recorded, list) or not set(map(str, recorded)) <= set(QUANT_TARGETS):
        raise CheckpointError(
            f"{run.path}: run.json says quant_targets {recorded!r}; expected some of {', '.join(QUANT_TARGETS)}."
        )
    return tuple(recorded)


def _check_family(llama_type: str, wanted: str, method: type[Method], args: ModelArgs, new: bool) -> None:
    family = architecture_of(args.architecture, "architecture").family
    if family != wanted:
        found = "--llama_config states the settings of" if new else "the checkpoint is"
        another = ", or give a config.json of the other family" if new else ""
        raise ConfigError(
            f"--llama_type {llama_type}: {found} a {args.architecture}, of the family {family}; use --llama_type "
            f"{family}{method.suffix}{another}."
        )


def _check_blocks(args: ModelArgs, sources: list[Source]) -> None:
    """Raise `CheckpointError` if settings and files disagree on the number of blocks, before that many are made."""
    whole = [source for source in sources if not source.is_delta]
    numbers = {int(m[1]) for source in whole for name in source.tensors if (m := re.match(r"layers\.(\d+)\.", name))}
    if numbers and args.n_layers != len(numbers):
        where = ", ".join(str(source.path) for source in whole)
        raise CheckpointError(f"{where}: its settings say {args.n_layers} blocks, its files hold {len(numbers)}.")


def plain_linears(sources: list[Source]) -> frozenset[str]:
    """Names of the linears that a packed base holds unpacked."""
    packed = next((s for s in sources if s.storage), None)
    if packed is None:
        return frozenset()
    matrices = {name: tensor for name, tensor in packed.tensors.items() if BLOCK_LINEAR.fullmatch(name)}
    return frozenset(name.removesuffix(".weight") for name, t in matrices.items() if not isinstance(t, PackedTensor))


def _named(llama_type: str) -> tuple[str, str, type[Method]]:
    """The family, the image encoder or nothing, and the method that a value of `--llama_type` names.

    Raises `ConfigError` for an unknown one.
    """
    known = {family + method.suffix: (family, "", method) for family in FAMILIES for method in METHODS.values()}
    encoders = [name for name in VISIONS if name != UNNAMED]
    known |= {f"{family}_{name}{method.suffix}": (family, name, method)
              for family in _SEEING for name in encoders for method in _seeing_methods(name)}  # fmt: skip
    if llama_type not in known:
        hint = _family_hint(llama_type) or nearest(llama_type, known)
        raise ConfigError(f"--llama_type {llama_type!r} is not supported.{hint} Known: {', '.join(known)}.")
    return known[llama_type]


def _seeing_methods(encoder: str) -> list[type[Method]]:
    """Those that train models which see images by the encoder of that name."""
    seeing = (method for method in METHODS.values() if not isinstance(method.vision_fault, str))
    return [method for method in seeing if encoder == UNNAMED or not method.sees_by_clip]


def _vision(sources: list[Source], llama_type: str, family: str, named: str, method: type[Method]) -> Vision | None:
    """The image encoder that the sources have, which may need `named` in --llama_type. Raises `AccessoryError`s."""
    vision = vision_among(sources, named, llama_type)
    if vision is None:
        return None
    found, encoder = f"--llama_type {llama_type} with an image encoder", "" if vision.name == UNNAMED else vision.name
    if fault := method.vision_fault:
        raise ConfigError(f"{found}: {fault}; leave it out with --no_visual.")
    if family not in _SEEING:
        raise ConfigError(f"{found}: models of {', '.join(_SEEING)} alone see images; leave it out with --no_visual.")
    if vision.name != UNNAMED and method.sees_by_clip:
        raise ConfigError(
            f"{found}, which is {vision.name}: models of this type see by CLIP; give its directory with --vision_path, "
            "or leave it out with --no_visual."
        )
    if named != encoder:
        fitting = named_with_encoder(family, vision) + method.suffix
        raise ConfigError(
            f"{found}, which is {vision.name}: give --llama_type {fitting}, or leave it out with --no_visual."
        )
    return vision


def _family_hint(llama_type: str) -> str:
    """What to write instead of a `llama_type` that begins with a model's name, or ends in an unknown method."""
    suffixes = {method.suffix: method.suffix for method in METHODS.values()}
    suffixes |= {f"_{word}": method.suffix for method in METHODS.values() for word in method.also_called}
    model, method = re.fullmatch(f"(.*?)({'|'.join(suffixes)}|)", llama_type.lower().replace("-", "_")).groups()
    beginnings = [name for name in _FAMILY_OF if model.startswith(name)]
    if not beginnings or (model in FAMILIES and not method):
        return ""
    name = max(beginnings, key=len)
    rest = model.removeprefix(name).lstrip("0123456789._b")
    if rest == UNNAMED:
        return " CLIP is not named there: give its directory with --vision_path."
    if seeing := [f"{seen}_{encoder}{known.suffix}" for encoder in VISIONS if encoder in rest
                  for seen in _SEEING for known in _seeing_methods(encoder)]:  # fmt: skip
        return f" Images go with {', '.join(seeing)}."
    if rest and name in FAMILIES:  # such as llama_ens_peft
        there_is = "; ".join(f"{known.summary} ({name}{known.suffix})" for known in METHODS.values())
        return f" There is no {rest!r} yet, only {there_is}."
    family = _FAMILY_OF[name]
    return f" Use --llama_type {family}{suffixes.get(method, '')}: {name} is of the family {family}."


def _settings(
    sources: list[Source],
    stated: Sequence[Path | Mapping[str, Any]],
    method_class: type[Method],
    flags: Mapping[str, tuple[str, Any]],
) -> tuple[ModelArgs, Method]:
    """Merge settings. A method's keys in a checkpoint's own file are dropped if another method is asked for."""
    model_keys, method_keys = set(ModelArgs.model_fields), set(method_class.Settings.model_fields)
    merged: dict[str, Any] = {}
    for source in sources:
        merged |= {k: v for k, v in (source.settings or {}).items() if k in model_keys | method_keys}
    # Rows of a trained part can be put into the base's rotary layout; those of a packed base could not.
    if sources:
        merged["rotary_layout"] = sources[0].rotary_layout
    faults, stated_by = [], {}
    names = ["llama_config" if isinstance(part, Mapping) else str(part) for part in stated]
    for name, part in zip(names, stated, strict=True):
        content = method_class.translated(dict(part) if isinstance(part, Mapping) else _stated_settings(part))
        faults += [f"{name}: unknown key {key!r}{_unknown_key(key, model_keys | method_keys)}"
                   for key in content if key not in model_keys | method_keys]  # fmt: skip
        merged |= content
        stated_by |= dict.fromkeys(content, name)
    faults += [_flag_fault(flag, key, stated_by, method_keys) for key, (flag, _) in flags.items()
               if key in stated_by or key not in method_keys]  # fmt: skip
    for key, (_, value) in flags.items():
        merged = method_class.beside_flags.get(key, {}) | merged | {key: value}
    names += [flag for flag, _ in flags.values()]
    if "dim" not in merged and not faults:
        where = ", ".join(str(source.path) for source in sources)
        lacks = f"{where}: holds no config.json or params.json" if sources else "No file states 'dim'"
        raise ConfigError(f"{lacks}; give the model's settings with --llama_config.")
    files = [str(source.path) for source in sources if source.settings] + names
    parts = []
    for part, keys in ((ModelArgs, model_keys), (method_class.Settings, method_keys)):
        try:
            parts.append(part(**{key: value for key, value in merged.items() if key in keys}))
        except ValidationError as error:
            faults.append(explain_validation(error, " + ".join(files), keys))
    if faults:
        raise ConfigError("\n".join(faults))
    method = method_class(parts[1]).beside(parts[0])
    if flags and getattr(method.settings, "lora_rank", 1) <= 0:
        raise ConfigError(
            f"{', '.join(flag for flag, _ in flags.values())} without LoRA changes nothing: give --lora_r."
        )
    replaced: set[str] = set()
    for source in reversed(sources):
        added = set(filter(method.added, source.tensors))
        if added - replaced and (conflict := method.conflict(source.settings or {}, parts[0])):
            way = " Parts of different scales do not go together; merge one into the base (tools/merge.py)."
            raise ConfigError(f"{source.path}: {conflict}.{way if replaced else ''}")
        replaced |= added
    return parts[0], method


def _flag_fault(flag: str, key: str, stated_by: Mapping[str, str], known: set[str]) -> str:
    if key in stated_by:
        return f"{flag}: {stated_by[key]} has {key!r} already; leave one out."
    return f"{flag}{_unknown_key(key, known)}"


def _stated_settings(path: Path) -> dict[str, Any]:
    """The settings in a JSON file of --llama_config; those of a Hugging Face config.json are translated into ours."""
    try:
        content = read_json(path)
        if "model_type" not in content:
            return content
        architecture = architecture_of(content["model_type"], str(path))
        args = settings_read_by(lambda: architecture.read(content, str(path)), path)
    except CheckpointError as error:
        raise ConfigError(f"--llama_config {error}") from error
    return args.model_dump(exclude={"rotary_layout"})  # it depends on how the weights are stored


def _unknown_key(key: str, known: set[str]) -> str:
    if key in _THEIR_KEYS:
        return f': it is "{_THEIR_KEYS[key]}" here; or give the whole config.json, with its model_type.'
    said = unknown(key, known)
    homes = [method.suffix for method in METHODS.values() if key in method.Settings.model_fields]
    theirs = said.startswith(":") and f'"{key}"' not in said  # others call by this name what has another here
    return f": it goes with a --llama_type that ends in {homes[0]}." if homes and not theirs else said


def _unread(source: Source) -> tuple[str, ...]:
    """A note on the keys of a checkpoint's own settings that are unknown here; empty if there are none."""
    known = set(ModelArgs.model_fields) | setting_names()
    known |= {vision.key for vision in VISIONS.values()}
    unread = sorted((source.settings or {}).keys() - known)
    return (f"not used of its settings, as unknown here: {', '.join(unread)}",) if unread else ()


def tokenizer_place(sources: list[Source]) -> Path | None:
    """Where the tokenizer of a model lies: with the last source that has one; None where none has."""
    places = (source for source in reversed(sources) if not source.is_vision)
    return next((s.path for s in places if s.format == "GGUF" or holds_tokenizer(s.path)), None)


def _tokenizer(
    sources: list[Source], tokenizer_path: Path | None, opener: Callable[[Path], StatedTokenizer]
) -> StatedTokenizer:
    if tokenizer_path:
        try:
            return opener(tokenizer_path)
        except TokenizerError as error:
            raise TokenizerError(f"--tokenizer_path {error}") from error
    if place := tokenizer_place(sources):
        return opener(place)
    where = ", ".join(str(source.path) for source in sources)
    kinds = "(tokenizer.json, tokenizer.model, ...)"
    lacks = f"{where}: holds no tokenizer {kinds}" if sources else "There is no --pretrained_path"
    raise TokenizerError(f"{lacks}; give --tokenizer_path.")


def _with_vocabulary(args: ModelArgs, sources: list[Source], tokenizer: Tokenizer) -> tuple[ModelArgs, tuple[str, ...]]:
    rows, tokens = _embedding_rows(sources, args), tokenizer.vocab_size
    if not sources:  # a new model's rows are as many as asked for, or as needed
        if 0 <= rows < tokens:
            raise ConfigError(f"--llama_config: 'vocab_size' is {rows}, below the tokenizer's {tokens}; leave it out.")
        return args.model_copy(update={"vocab_size": max(rows, tokens)}), ()
    # Tokens beyond the embedding are all right if they were added, since it will grow; else they are another model's.
    foreign = set(range(rows, tokens)) - tokenizer.added_tokens().keys()
    if abs(tokens - rows) > SLACK_ROWS or foreign:
        raise TokenizerError(
            f"The tokenizer has {tokens} tokens, the model's embedding {rows} rows: they do not belong together. Give "
            "the model's own tokenizer with --tokenizer_path."
        )
    notes = ()
    if tokens < rows:
        notes = (f"the embedding has {rows:,} rows for {tokens:,} tokens: {rows - tokens} are padding",)
    elif tokens > rows:
        notes = (
            f"the tokenizer has {tokens - rows} tokens more than the embedding's {rows:,} rows: each gets a row that "
            "starts as the mean of those",
        )
    return args.model_copy(update={"vocab_size": max(rows, tokens)}), notes


def _embedding_rows(sources: list[Source], args: ModelArgs) -> int:
    embeddings = [s.tensors["tok_embeddings.weight"] for s in sources if "tok_embeddings.weight" in s.tensors]
    if embeddings and len(embeddings[-1].shape) != 2:
        where = " + ".join(str(source.path) for source in sources)
        raise CheckpointError(
            f"{where}: its embedding has shape {embeddings[-1].shape}; expected a row for each token."
        )
    return embeddings[-1].shape[0] if embeddings else args.vocab_size
