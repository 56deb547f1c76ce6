"""adapter_config.json of a PEFT LoRA directory: what of it is understood, and what is refused by name."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from accessory.checkpoint.source import read_json
from accessory.errors import CheckpointError, explain_validation

CONFIG_FILE = "adapter_config.json"
SUPPORTED = (
    "Supported: LoRA (rank_pattern, alpha_pattern, use_rslora, layers_to_transform) on the linears of attention and "
    "feed-forward, norms in modules_to_save, and bias."
)
MERGE_FIRST = "Merge the adapter into its base with PEFT (merge_and_unload), and give the result."
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on LoRA's own factors",
    "fan_in_fan_out": "LoRA on transposed weights (Conv1D)",
    "trainable_token_indices": "single trained tokens",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on bare parameters",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA",
}
_PLAIN_INITS = ("true", "false", "none", "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base as it was, so that the file alone says what the adapter does."""
_HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "init_lora_weights",
    "modules_to_save", "bias", "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "runtime_config", "ensure_weight_tying", "merge_weights",
}  # fmt: skip


class AdapterConfig(BaseModel):
    """The keys that decide what an adapter's tensors are and do; names and meanings are PEFT's."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    r: int = Field(8, gt=0)
    lora_alpha: float = 8
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    base_model_name_or_path: str | None = None

    def rank_of(self, module: str) -> int:
        """Rank of the module of that (full) name."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def scale_of(self, module: str) -> float:
        """What the product of the module's factors is multiplied by."""
        rank = self.rank_of(module)
        return _by_pattern(self.alpha_pattern, module, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def covers(self, module: str) -> bool:
        """Whether PEFT puts LoRA on the linear of that (full) name."""
        if self.exclude_modules and _names(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules == "all-linear" or _names(self.target_modules, module)
        return _names(self.target_modules or [], module) and self._takes_layer(module)

    def _takes_layer(self, module: str) -> bool:
        wanted = self.layers_to_transform
        if wanted is None or wanted == []:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        for pattern in patterns or [r"[^.]*"]:
            if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
                return int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)
        return False


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that the name's last parts match."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _names(stated: list[str] | str, module: str) -> bool:
    """PEFT's rule: a text is a pattern of the whole name, a list holds names or ends of names."""
    if isinstance(stated, str):
        return re.fullmatch(stated, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in stated)


def read_adapter_config(file: Path) -> AdapterConfig:
    """Read adapter_config.json. Raises `CheckpointError` naming every key that cannot be honoured."""
    stated = read_json(file)
    if faults := _faults(stated):
        raise CheckpointError(f"{file}: {'; '.join(faults)}: not supported. {SUPPORTED} {MERGE_FIRST}")
    # In PEFT's files null means "not set".
    said = {key: value for key, value in stated.items() if value is not None}
    try:
        config = AdapterConfig(**said)
    except ValidationError as error:
        raise CheckpointError(explain_validation(error, str(file), AdapterConfig.model_fields)) from error
    texts = [config.target_modules, config.exclude_modules, config.layers_pattern]
    for pattern in [*config.rank_pattern, *config.alpha_pattern, *(t for t in texts if isinstance(t, str))]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(f"{file}: {pattern!r} is not a regular expression ({error}).") from error
    return config


def _faults(stated: dict[str, Any]) -> list[str]:
    if (kind := stated.get("peft_type")) != "LORA":
        return [f"peft_type {kind!r}"]
    faults = [f"{what} ({key})" for key, what in _REFUSED.items() if stated.get(key)]
    init = stated.get("init_lora_weights", True)
    if str(init).lower() not in _PLAIN_INITS:
        faults.append(f"init_lora_weights {init!r}, which changes the base")
    known = _HARMLESS | set(_REFUSED) | set(AdapterConfig.model_fields)
    return faults + [f"{key} {value!r}" for key, value in stated.items() if key not in known and value]
