"""What LLaMA2-Accessory's scripts under exps/finetune/ pass to main_finetune.py, and where ours differ from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

Flags = Mapping[str, Any]
_COMMON = {
    "batch_size": 4, "num_workers": 4, "max_words": 512, "clip_grad": 2, "data_parallel": "sdp",
    "model_parallel_size": 1, "checkpointing": True, "no_visual": True, "pretrained_type": "meta_ori", "config": None,
}  # fmt: skip
_FULL = _COMMON | {
    "llama_type": "llama", "epochs": 3, "warmup_epochs": 0.04, "accum_iter": 8, "lr": 2e-5, "min_lr": 0,
    "weight_decay": 0,
}  # fmt: skip
_PEFT = _COMMON | {
    "llama_type": "llama_peft", "epochs": 4, "warmup_epochs": 1, "accum_iter": 2, "lr": 5e-5, "min_lr": 5e-6,
    "weight_decay": 0.02,
}  # fmt: skip
_DIALOG = _FULL | {"dialog": True, "max_words": 4096}
_CUT_8 = {"model_parallel_size": 8, "batch_size": 2, "accum_iter": 64}
_INTERNLM = {"llama_type": "internlm"}
_LORA = {"config": "sg/llamaPeft_normBiasLora.json"}
_QUANT = {"quant": True, "only_save_trainable": True}
_LATER = {"pretrained_type": "consolidated"}  # goes on from what another script has trained
_GORILLA = {"data": "sg/gorilla", "epochs": 10, "warmup_epochs": 2, "lr": 1e-3}
_MM = {key: value for key, value in _PEFT.items() if key != "no_visual"} | _LATER
_MM |= {"epochs": 3, "warmup_epochs": 0.2, "batch_size": 16}
_MM_ADAPTER = {"llama_type": "llama_adapter", "config": "mm/llamaAdapter_normBiasLora.json"}


def _of(values: Flags, data: str, *changes: Flags, **more: Any) -> Flags:
    found = {**values, "data": data}
    for change in (*changes, more):
        found |= change
    return {name: value for name, value in found.items() if value is not False}


UPSTREAM: dict[str, Flags] = {
    "sg/alpaca": _of(_FULL, "sg/alpaca"),
    "sg/alpaca_internLM": _of(_FULL, "sg/alpaca", _INTERNLM, _LATER),
    "sg/alpaca_llamaAdapter": _of(
        _PEFT, "sg/alpaca", llama_type="llama_adapter", config="sg/llamaAdapter.json", max_words=1024,
        checkpointing=False,
    ),
    "sg/alpaca_llamaPeft_normBias": _of(_PEFT, "sg/alpaca"),
    "sg/alpaca_llamaPeft_normBiasLora": _of(_PEFT, "sg/alpaca", _LORA),
    "sg/alpaca_llamaPeft_normBiasLora_QF": _of(_PEFT, "sg/alpaca", _LORA, _QUANT),
    "sg/alpaca_llamaPeft_normBias_QF": _of(_PEFT, "sg/alpaca", _QUANT),
    "sg/dialog_flacuna": _of(_DIALOG, "sg/dialog_flacuna"),
    "sg/dialog_flacunaChineseSft_13B": _of(
        _DIALOG, "sg/dialog_chineseSft", _LATER, max_words=2048, model_parallel_size=2
    ),
    "sg/dialog_flacunaChineseSft_70B": _of(_DIALOG, "sg/dialog_chineseSft", _LATER, _CUT_8, max_words=2048, epochs=2),
    "sg/dialog_flacuna_13B": _of(_DIALOG, "sg/dialog_flacuna", max_words=2048, model_parallel_size=2),
    "sg/dialog_flacuna_internLM": _of(_DIALOG, "sg/dialog_flacuna", _INTERNLM, _LATER),
    "sg/dialog_lima": _of(_DIALOG, "sg/dialog_lima"),
    "sg/dialog_lima_13B": _of(_DIALOG, "sg/dialog_lima", model_parallel_size=2),
    "sg/dialog_moss": _of(_DIALOG, "sg/dialog_moss"),
    "sg/dialog_sharegpt": _of(_DIALOG, "sg/dialog_sharegpt"),
    "sg/dialog_sharegpt_13B": _of(_DIALOG, "sg/dialog_sharegpt", model_parallel_size=2),
    "sg/dialog_sharegpt_70B": _of(_DIALOG, "sg/dialog_sharegpt", _CUT_8),
    "sg/dialog_sharegpt_llamaPeft_normBiasLora": _of(
        _PEFT, "sg/dialog_sharegpt", _LORA, dialog=True, max_words=4096
    ),
    "sg/dialog_ultrachat": _of(_DIALOG, "sg/dialog_ultrachat"),
    "sg/dialog_wizardCode": _of(_DIALOG, "sg/dialog_wizardCode"),
    "sg/dialog_wizardCode_13B": _of(_DIALOG, "sg/dialog_wizardCode", model_parallel_size=2),
    "sg/dialog_wizardCode_34B": _of(_DIALOG, "sg/dialog_wizardCode", _CUT_8, model_parallel_size=4),
    "sg/dialog_wizardLM": _of(_DIALOG, "sg/dialog_wizardLM"),
    "sg/gorilla": _of(_FULL, "sg/gorilla"),
    "sg/gorilla_llamaAdapter": _of(_PEFT, "sg/gorilla", _GORILLA, llama_type="llama_adapter"),
    "sg/gorilla_llamaPeft_normBias": _of(_PEFT, "sg/gorilla", _GORILLA),
    "sg/gorilla_llamaPeft_normBiasLora": _of(_PEFT, "sg/gorilla", _GORILLA, _LORA),
    "sg/platypus": _of(_FULL, "sg/platypus"),
    "sg/platypus_llamaPeft_normBias_QF": _of(_PEFT, "sg/platypus", _QUANT, exp_name="finetune/sg/platypus_normBias_QF"),
    "mm/alpacaLlavaVqav2_llamaAdapter": _of(
        _MM, "mm/alpaca_llava_vqav2", _MM_ADAPTER, batch_size=8, accum_iter=4, checkpointing=False
    ),
    "mm/alpacaLlava_llamaQformerv2Peft_13B": _of(
        _MM, "mm/alpaca_llava", _LORA, llama_type="llama_qformerv2_peft", model_parallel_size=2
    ),
    "mm/alpacaLlava_llamaQformerv2Peft_QF_13B": _of(
        _MM, "mm/alpaca_llava", _LORA, _QUANT, llama_type="llama_qformerv2_peft", accum_iter=1, num_workers=16
    ),
    "mm/alpacaLlava_llamaQformerv2_13B": _of(
        _MM, "mm/alpaca_llava", llama_type="llama_qformerv2", data_parallel="fsdp", model_parallel_size=2, batch_size=4,
        lr=3e-5,
    ),
    "mm/llavaVqav2_llamaAdapter": _of(_MM, "mm/llava_vqav2", _MM_ADAPTER),
}  # fmt: skip
"""Script -> the flags that it passes, without those that hold its arguments.

`data` is the YAML of --data_config and `config` the JSON beside the model's own in --llama_config, below configs/.
`exp_name` is where below output/ the run is kept, absent: finetune/ and the script's name.
"""

_ALPACA = ("alpaca_gpt4_data.json", None)
_LLAVA = ("llava_instruct_150k_single_turn.json", "single_turn_llava")
_VQA = ("vqav2_brief.json", None)
_COIG = (
    *(f"human_value_alignment_instructions_part{part}" for part in (1, 2)),
    *(f"{name}_instructions" for name in ("leetcode", "translated", "exam")),
)
DATA: dict[str, list[tuple[str, str | None]]] = {
    "sg/alpaca": [_ALPACA],
    "sg/dialog_chineseSft": [
        *((f"chinese_sft/COIG_sharegpt/{name}.json", None) for name in _COIG),
        ("chinese_sft/BelleGroup_train_3.5M_CN/train_3.5M_CN.jsonl", None),
    ],
    "sg/dialog_flacuna": [("flan_mini_fastchat_4k.json", None)],
    "sg/dialog_lima": [("lima_vicuna_format.json", None)],
    "sg/dialog_moss": [("moss_fastchat_4k.json", None)],
    "sg/dialog_sharegpt": [("sharegpt.json", None)],
    "sg/dialog_ultrachat": [("ultrachat_fastchat_4k.json", None)],
    "sg/dialog_wizardCode": [("evol-codealpaca-v1/wizardCode.json", None)],
    "sg/dialog_wizardLM": [("WizardLM_evol_instruct_V2_196k/WizardLM_evol_instruct_V2_143k.json", None)],
    "sg/gorilla": [("tensorflow_train_formatted.json", None)],
    "sg/platypus": [("Platypus_alpaca_format.json", None), _ALPACA],
    "mm/alpaca_llava": [_ALPACA, _LLAVA],
    "mm/alpaca_llava_vqav2": [_ALPACA, _VQA, _LLAVA],
    "mm/llava_vqav2": [_VQA, _LLAVA],
}
"""YAML below configs/data/finetune/ -> the (file below data/, `preprocess`) of its entries."""

_LORA_SETTINGS = {"lora_rank": 16, "bias_tuning": True}
_PREFIX = {"bias_tuning": True, "prefix_len": 10}
CONFIGS: dict[str, Flags] = {
    "finetune/sg/llamaPeft_biasLora": _LORA_SETTINGS,
    "finetune/sg/llamaPeft_normBiasLora": _LORA_SETTINGS | {"norm_tuning": True},
    "finetune/sg/llamaAdapter": _PREFIX | {
        "lora_rank": -1, "use_prefix_new_gate": False, "prefix_layers": 30, "trainable_mode": "sg",
    },
    "finetune/mm/llamaAdapter_normBiasLora": _PREFIX | {
        "lora_rank": 16, "use_prefix_new_gate": True, "prefix_layers": 31, "trainable_mode": "mm_stage2",
    },
    "pretrain/rope_scaling0.125": {"rope_scaling": 0.125},
    "pretrain/rope_scaling0.5": {"rope_scaling": 0.5},
}  # fmt: skip
"""JSON below configs/model/ -> what it holds."""


@dataclass(frozen=True)
class Difference:
    """What one or several things of ours have otherwise.

    where: a pattern of names of scripts, or of YAMLs. what: the flag, or `path` of a YAML's entry. there: the value, or
    a tuple of those that it has in one or another. here: the value, None: absent. why: for docs/coming-from.md.
    """

    where: str
    what: str
    there: Any
    here: Any
    why: str


DIFFERENCES = (
    Difference("*", "pretrained_type", ("meta_ori", "consolidated"), None, "the format is told from the files"),
    Difference("sg/*_internLM", "llama_type", "internlm", "llama", "the checkpoint says that it is an InternLM"),
    Difference("sg/platypus_llamaPeft_normBias_QF", "exp_name", "finetune/sg/platypus_normBias_QF",
               "finetune/sg/platypus_llamaPeft_normBias_QF", "the folder is called as the script"),
    Difference("sg/gorilla", "path", "tensorflow_train_formatted.json", "APIBench/tensorflow_train.json",
               "the published file is read as it is"),
    Difference("sg/platypus", "path", "Platypus_alpaca_format.json", "Open-Platypus",
               "the published directory is read as it is"),
    Difference("sg/dialog_wizardCode", "path", "evol-codealpaca-v1/wizardCode.json", "evol-codealpaca-v1/train.jsonl",
               "the published file is read as it is"),
    Difference("sg/dialog_sharegpt", "path", "sharegpt.json", "ShareGPT_V3_unfiltered_cleaned_split.json",
               "it is published; that of LLaMA2-Accessory is not"),
    Difference("mm/*", "path", "llava_instruct_150k_single_turn.json", "llava_instruct_150k.json",
               "each question of the published file is read by itself"),
)  # fmt: skip

LAUNCHERS = (
    ("all scripts", "torchrun on port 1112, 8 processes", "torchrun on a free port, `NPROC` processes",
     "two runs can share a machine"),
    ("`dialog_flacuna_13B`, `dialog_flacunaChineseSft_13B`", "nodes from `MASTER_ADDR`, `NNODES`, `NODE_RANK`",
     "`TORCHRUN_FLAGS`", "one variable takes any of torchrun's flags"),
    ("`*_34B`, `*_70B`", "python, started by SLURM", "torchrun; `LAUNCHER=python` starts as there",
     "all scripts start alike"),
)  # fmt: skip
"""How scripts are started: (which, there, here, why), for docs/coming-from.md."""

LEFT_OUT = {
    "sg/dialog_ultrachat200kWizardcode_mixtral": "mixture of experts",
    "sg/dialog_ultrachat200kWizardcode_mixtralPeft": "mixture of experts",
    "sg/dialog_ultrachat200kWizardcode_mixtralSparse": "mixture of experts",
}
"""Script that is not here -> why."""


def ours(where: str, what: str, there: Any) -> Any:
    """The value that ours has for one of upstream's; None: absent."""
    for found in DIFFERENCES:
        if found.what == what and fnmatchcase(where, found.where) and there in _several(found.there):
            return found.here
    return there


def differences_table() -> str:
    """What ours have otherwise, for docs/coming-from.md."""
    rows = ["| of | there | here | why |", "|---|---|---|---|"]
    rows += [f"| {' | '.join(row)} |" for row in LAUNCHERS]
    for found in DIFFERENCES:
        of = "all scripts" if found.where == "*" else f"`{found.where.removeprefix('sg/')}`"
        there = " or ".join(_shown(found.what, value) for value in _several(found.there))
        rows.append(f"| {of} | {there} | {_shown(found.what, found.here)} | {found.why} |")
    for name, there in LEFT_OUT.items():
        rows.append(f"| `{name.removeprefix('sg/')}` | {there} | not here | no such model |")
    return "\n".join(rows)


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _shown(what: str, value: Any) -> str:
    if value is None:
        return "absent"
    return f"`{value}`" if what in ("path", "exp_name") else f"`--{what} {value}`"
