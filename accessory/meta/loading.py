"""How a model is loaded from checkpoints, and how its trained part is exchanged for another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from accessory.blueprint import Blueprint, make_blueprint, tokenizer_place
from accessory.checkpoint.exchange import hand_on
from accessory.checkpoint.load import fill, resolve
from accessory.checkpoint.run_record import beside, trained_prompt_layouts, trained_system
from accessory.checkpoint.source import Source
from accessory.checkpoint.vision_part import without_vision
from accessory.errors import ConfigError
from accessory.model.decoder import Decoder
from accessory.parallel.agree import together
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout
from accessory.tokenizer import Tokenizer, open_tokenizer, same_tokenizer


class Loaded(NamedTuple):
    """How a model was loaded: base and trained parts, what was built of them, and arguments of `from_pretrained`.

    how: those of `make_blueprint` that another part does not change. quant_stated: whether the caller chose a storage.
    trained: names of the decoder's parameters that training trains.
    """

    sources: list[Source]
    blueprint: Blueprint
    layout: Layout
    max_seq_len: int
    how: dict[str, Any]
    quant_stated: bool
    trained: frozenset[str]


def filled(
    blueprint: Blueprint,
    sources: list[Source],
    layout: Layout,
    put_in_place: Callable[[Decoder], set[str]] = lambda _: set(),
    seed: int | None = None,
) -> tuple[Decoder, frozenset[str]]:
    """A decoder, and the names of what training trains of it.

    put_in_place: fills some of it beforehand, and returns their names. seed: of what it starts with for training; None:
    it is only asked, and has no gradients.
    """
    decoder, attachment = together(blueprint.build, layout)
    tensors = together(resolve, decoder, sources, attachment, initialize=seed is not None)
    there, alone = put_in_place(decoder), DataParallel(layout, "sdp", base_is_trained=False)
    together(fill, decoder, tensors, attachment, layout, alone, seed or 0, there=there)
    trained = {name for name, _ in decoder.named_parameters()} if blueprint.method.trains_base else attachment.trainable
    if seed is None:
        decoder.requires_grad_(False).eval()
    return decoder, frozenset(trained)


def exchanged(
    loaded: Loaded,
    decoder: Decoder,
    paths: list[Path],
    llama_type: str | None,
    llama_config: list[Path | Mapping[str, Any]],
) -> tuple[Decoder, Loaded]:
    """A decoder with the trained parts at `paths` beside the base of `decoder`, and how it was loaded.

    loaded: how `decoder` was. The new one takes over the base's weights, which are not read again. All model-parallel
    ranks must call it. Raises `AccessoryError`s for what does not belong to the base; `decoder` is then what it was.
    """
    sources = base = [source for source in loaded.sources if not (source.is_delta or source.is_difference)]
    encoder = next((source for source in loaded.sources if source.is_vision), None)
    if paths:
        sources = together(beside, base, paths, encoder)
        sources = without_vision(sources) if loaded.how["no_visual"] else sources
    together(_check_storage, sources, loaded)
    named = {"llama_type": llama_type, "llama_config": llama_config}
    kept = {"quant_type": loaded.blueprint.quant_type, "opener": partial(_reopened, loaded), **loaded.how}
    blueprint = together(make_blueprint, sources, **named, **kept)
    together(_check_targets, blueprint, loaded.blueprint)
    parts = (s for s in (*sources, *loaded.sources) if (s.is_delta or s.is_difference) and s is not encoder)
    trained = {name for part in parts for name in part.tensors}
    new, names = filled(blueprint, sources, loaded.layout, lambda new: hand_on(decoder, new, trained))
    return new, loaded._replace(sources=sources, blueprint=blueprint, trained=names)


def trained_prompts(sources: list[Source]) -> tuple[tuple[str, ...], str | None]:
    """(prompt layouts, words of the system) of what the parts among `sources` were trained on."""
    return trained_prompt_layouts(sources), trained_system(sources)


def _reopened(loaded: Loaded, path: Path) -> Tokenizer:
    """The tokenizer at `path`, or the one that is loaded where it is the same."""
    before = loaded.how["tokenizer_path"] or tokenizer_place(loaded.sources)
    return loaded.blueprint.tokenizer if same_tokenizer(before, path) else open_tokenizer(path)


def _check_storage(sources: list[Source], loaded: Loaded) -> None:
    """Raise `ConfigError` for a part that was trained beside another storage than that which is loaded by default."""
    part = next((source for source in reversed(sources) if source.run), None)
    held = loaded.blueprint.quant_type
    if part is None or loaded.quant_stated or part.run["quantization"] == held:
        return
    found, there = (f"a base packed as {name}" if name else "a plain base" for name in (part.run["quantization"], held))
    raise ConfigError(
        f"{part.path}: was trained beside {found}; loaded is {there}. To use it all the same, state quant (and "
        "quant_type) in from_pretrained."
    )


def _check_targets(new: Blueprint, held: Blueprint) -> None:
    """Raise `ConfigError` where other linears of the base would be packed than those that are."""
    aimed = held.quant_targets or new.quant_targets
    if not (held.quant_type and aimed):
        return
    if new.packed_as(held.quant_type) != held.packed_as(held.quant_type):
        raise ConfigError(
            f"It was trained with --quant_targets {' '.join(new.quant_targets) or '(all)'}, loaded is a base with "
            f"{' '.join(held.quant_targets) or '(all)'}: other linears are packed. Load it with from_pretrained."
        )
