"""A model type of other libraries: how its files spell our settings and name our weights.

A model type is data. This file reads and writes settings with it; `accessory.checkpoint.naming` moves weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from accessory.errors import CheckpointError
from accessory.model.args import MOST_BLOCKS, ModelArgs, RopeScaling

Config = dict[str, Any]
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip
"""Their name of an activation -> ours."""
_KINDS = ("full_attention", "sliding_attention")
_THEIR_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "relu": "relu", "gelu_tanh": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class Fused:
    """One of their matrices that holds several of ours, stacked by rows.

    groups: "whole": ours follow one another. "heads", "kv_heads": for each attention head, or key/value head, the rows
    of all of ours that belong to it.
    """

    parts: tuple[str, ...]
    groups: Literal["whole", "heads", "kv_heads"] = "whole"


@dataclass(frozen=True)
class Names:
    """Their module names -> ours; `.weight` and `.bias` follow on both sides.

    outer: modules outside the blocks. block: beginning of a block's names, `{}` for its number; inner: the rest.
    prefix: beginning of all names, which some files leave out. needless: pattern of tensors that are ignored.
    """

    outer: Mapping[str, str]
    block: str
    inner: Mapping[str, str | Fused]
    prefix: str = ""
    needless: str = r"rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq"

    def ours(self, name: str) -> tuple[str | Fused, str] | None:
        """(our module or the fused ones, with the block's number; "weight" or "bias"); None if unknown."""
        module, _, leaf = name.rpartition(".")
        if self.prefix and not module.startswith(self.prefix):
            module = self.prefix + module
        if module in self.outer:
            return self.outer[module], leaf
        found = re.fullmatch(re.escape(self.block).replace(r"\{\}", r"(\d+)") + "(.+)", module)
        if not found or found[2] not in self.inner:
            return None
        return _numbered(self.inner[found[2]], found[1]), leaf

    def theirs(self, module: str) -> tuple[str, str | Fused] | None:
        """(their module, our module or the fused ones in it) for our module; None if they have no place for it."""
        for their, our in self.outer.items():
            if our == module:
                return their, our
        found = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
        if found:
            for their, our in self.inner.items():
                if found[2] in (our.parts if isinstance(our, Fused) else (our,)):
                    return self.block.format(found[1]) + their, _numbered(our, found[1])
        return None

    def is_needless(self, name: str) -> bool:
        """Whether one of their tensors is to be ignored."""
        return re.search(self.needless, name) is not None


def _numbered(our: str | Fused, number: str) -> str | Fused:
    prefix = f"layers.{number}."
    if isinstance(our, Fused):
        return Fused(tuple(prefix + part for part in our.parts), our.groups)
    return prefix + our


@dataclass(frozen=True)
class Rope:
    """How a model type spells rotary settings: keys and defaults of the base and of the rotated share of a head.

    share_key: None if the share is fixed in the model's code.
    """

    theta_key: str = "rope_theta"
    theta: float = 10000.0
    share_key: str | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Gguf:
    """How GGUF files hold this model type: their architecture, which channels of q and k rotate together, names.

    rope_factors: whether llama.cpp applies stored frequency factors, which hold Llama 3's scaling.
    positions: number of blocks -> kind of position, where llama.cpp tells it by that number alone (Baichuan).
    biases: our settings of the biases that llama.cpp has a place for.
    tied: whether a file may lack the head, in which case the embedding is used. wide_heads: whether H x E may differ
    from D. partial_rotary: whether a part of a head's channels may stay unrotated.
    """

    architecture: str
    rotary_layout: Literal["pairs", "halves"]
    names: Names
    rope_factors: bool = False
    positions: Mapping[int, str] = field(default_factory=dict)
    biases: tuple[str, ...] = ("qkv_bias",)
    tied: bool = True
    wide_heads: bool = False
    partial_rotary: bool = False


@dataclass(frozen=True)
class Architecture:
    """One `model_type` of Hugging Face's config.json.

    family: first part of --llama_type. class_name: entry of `architectures`. names: of the weights.
    keys: our setting -> theirs ("a|b": either; the first is written). defaults: of our settings
    that a file does not state. fixed: settings that all its models share. required: their keys of which we compute only
    this value. rope: None for a model without rotary embedding.
    sliding: how a window is spelled: "plain" (Mistral), "switched" (Qwen: a switch and a first layer), or not at all.
    native: whether transformers knows it; other types need code that lies beside their files.
    unit_head_key: a key of those models that scale the rows of the head to length 1 before they use it; None: none do.
    """

    name: str
    family: str
    class_name: str
    names: Names
    keys: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, Any] = field(default_factory=dict)
    rope: Rope | None = field(default_factory=Rope)
    sliding: Literal["none", "plain", "switched"] = "none"
    gguf: Gguf | None = None
    native: bool = True
    unit_head_key: str | None = None

    def read(self, config: Config, source: str) -> ModelArgs:
        """ModelArgs from a config.json; `source` names it. Raises `CheckpointError` for what cannot be computed."""
        for key, wanted in self.required.items():
            if config.get(key, wanted) != wanted:
                raise CheckpointError(f"{source}: {key} {config[key]!r} is not supported; expected {wanted!r}.")
        values = {"architecture": self.name} | self._by_key(config, source) | dict(self.fixed)
        if self.rope and values.get("position", "rotary") == "rotary":
            width = ModelArgs(**values).head_dim  # raises for values of a wrong type
            if config.get("head_dim", width) not in (None, width):
                raise CheckpointError(f"{source}: head_dim {config['head_dim']!r} is not supported; expected {width}.")
            values |= self._rope(config, width, source)
        if self.sliding != "none":
            values |= self._window(config, values["n_layers"], source)
        return ModelArgs(**values)

    def _by_key(self, config: Config, source: str) -> Config:
        values = {}
        for ours, theirs in self.keys.items():
            stated = [config[key] for key in theirs.split("|") if config.get(key) is not None]
            if stated:
                values[ours] = stated[0]
            elif ours in self.defaults:
                values[ours] = self.defaults[ours]
            elif ours not in ("n_kv_heads", "head_dim"):
                raise CheckpointError(f"{source}: {theirs.split('|')[0]!r} is missing; expected the model's settings.")
        if "activation" in values:
            if str(values["activation"]) not in ACTIVATIONS:
                known = ", ".join(ACTIVATIONS)
                raise CheckpointError(
                    f"{source}: activation {values['activation']!r} is not supported; known: {known}."
                )
            values["activation"] = ACTIVATIONS[values["activation"]]
        return values

    def _rope(self, config: Config, width: int, source: str) -> Config:
        for key in ("rope_parameters", "rope_scaling"):
            if config.get(key) and not isinstance(config[key], dict):
                raise CheckpointError(f"{source}: {key!r} is {config[key]!r}; expected an object.")
        stated = config.get("rope_parameters") or config.get("rope_scaling") or {}
        scaling = {**stated, **(config.get("rope_scaling") or {})}
        if nested := [key for key, value in scaling.items() if isinstance(value, dict)]:
            raise CheckpointError(f"{source}: rotary settings of their own for {', '.join(nested)} are not supported.")
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        known = ("default", *RopeScaling.model_fields["kind"].annotation.__args__)
        if kind not in known:
            raise CheckpointError(f"{source}: rope scaling {kind!r} is not supported; known: {', '.join(known)}.")
        spelled = (self.rope.theta_key, "rope_theta")
        thetas = {place[key] for place in (config, scaling) for key in spelled if place.get(key) is not None}
        if len(thetas) > 1:
            raise CheckpointError(f"{source}: says {spelled[0]} twice, {sorted(thetas)}; expected one value.")
        share = self.rope.share
        if self.rope.share_key:
            share = config.get(self.rope.share_key, stated.get("partial_rotary_factor", share))
        return {
            "rope_theta": thetas.pop() if thetas else self.rope.theta,
            "rope_scaling": scaling if kind != "default" else None,
            "rotary_dim": int(width * share),
        }

    def _window(self, config: Config, blocks: Any, source: str) -> Config:
        # Defaults as in transformers: Mistral 0.1's window, and for Qwen none in the first 28 blocks.
        window, layers = config.get("sliding_window", 4096), None
        if type(blocks) is not int or blocks > MOST_BLOCKS:
            return {}  # `ModelArgs` refuses such a number of blocks
        if self.sliding == "switched":
            if not config.get("use_sliding_window"):
                return {}
            first = config.get("max_window_layers", 28)
            if type(first) is not int or first < 0:
                raise CheckpointError(f"{source}: 'max_window_layers' is {first!r}; expected a number of blocks.")
            layers = list(range(first, blocks))
        if kinds := config.get("layer_types"):
            if not (isinstance(kinds, list) and len(kinds) == blocks and all(kind in _KINDS for kind in kinds)):
                raise CheckpointError(
                    f"{source}: 'layer_types' is {kinds!r}; expected one of {', '.join(_KINDS)} for each of {blocks} "
                    "blocks."
                )
            layers = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"]
        return {"sliding_window": window, "sliding_layers": layers} if window else {}

    def write(self, args: ModelArgs) -> Config:
        """A config.json of this type for `args`. Raises `CheckpointError` naming the settings it cannot express."""
        config = {"architectures": [self.class_name], "model_type": self.name}
        for ours, theirs in self.keys.items():
            config[theirs.split("|")[0]] = getattr(args, ours)
        if "activation" in self.keys:
            config[self.keys["activation"].split("|")[0]] = _THEIR_ACTIVATIONS[args.activation]
        config |= dict(self.required)
        if self.rope and args.position == "rotary":
            config |= self._written_rope(args)
        if self.sliding != "none":
            config |= self._written_window(args)
        lost = self.lost(args, self.read(config, "config.json"))
        if lost:
            raise inexpressible(f"A {self.name} config.json", lost, args)
        return config

    def _written_rope(self, args: ModelArgs) -> Config:
        written: Config = {self.rope.theta_key: args.rope_theta}
        if self.rope.share_key:
            written[self.rope.share_key] = args.rotary_dim / args.head_dim
        if args.rope_scaling:
            scaling = args.rope_scaling.model_dump()
            kept = scaling if args.rope_scaling.kind == "llama3" else {"kind": 0, "factor": 0}
            written["rope_scaling"] = {"rope_type" if k == "kind" else k: scaling[k] for k in kept}
        return written

    def _written_window(self, args: ModelArgs) -> Config:
        written: Config = {"sliding_window": args.sliding_window}
        if self.sliding == "switched":
            layers = args.sliding_layers if args.sliding_layers is not None else list(range(args.n_layers))
            written |= {
                "use_sliding_window": args.sliding_window is not None,
                "max_window_layers": min(layers, default=args.n_layers) if args.sliding_window else args.n_layers,
            }
            if args.sliding_window:
                kinds = {True: "sliding_attention", False: "full_attention"}
                written["layer_types"] = [kinds[i in layers] for i in range(args.n_layers)]
        return written

    def lost(self, args: ModelArgs, reread: ModelArgs) -> list[str]:
        """Names of the settings in which `reread`, read back from such a file, differs from `args`."""
        return [
            name
            for name in ModelArgs.model_fields
            # The MLP's width counts, not how it was computed; rows can be permuted to another rotary layout; a window
            # of all layers may be stated once or layer by layer.
            if name not in _WORDING and getattr(args, name) != getattr(reread, name)
            and not (name == "sliding_layers" and [args.window(i) for i in range(args.n_layers)]
                     == [reread.window(i) for i in range(args.n_layers)])
        ]  # fmt: skip


_WORDING = {
    "architecture", "multiple_of", "ffn_dim_multiplier", "use_scaled_rope", "max_batch_size", "rotary_layout",
}  # fmt: skip


_BIASED = {"qkv_bias": "wq, wk, wv", "out_bias": "wo", "mlp_bias": "w1, w2, w3"}


def inexpressible(place: str, lost: list[str], args: ModelArgs) -> CheckpointError:
    """What to raise where `place` cannot say the settings called `lost` of a model."""
    said = ", ".join(f"{name} {getattr(args, name)!r}" for name in lost)
    text = f"{place} cannot express this model's {said}."
    if set(lost) <= _BIASED.keys():
        linears = ", ".join(_BIASED[name] for name in lost)
        text += (
            f" There is no place for the biases of {linears}: leave out those that training added with --drop_biases, "
            "which changes what was trained, or choose a format or --architecture that has one (llama does)."
        )
    return CheckpointError(text)
