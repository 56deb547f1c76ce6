"""Every flag of training and of the demo. The string under a field is its `--help` and its row in docs/flags.md."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from accessory.checkpoint.run_checkpoints import FEWEST
from accessory.checkpoint.training_state import CHANGEABLE
from accessory.data.finding import DATA_DIR, find_files
from accessory.data.templates import PROMPT_LAYOUTS
from accessory.errors import ConfigError, DataError, explain_validation, hub_hint, is_there
from accessory.foreign_names import unknown
from accessory.method import METHODS, QUANT_TARGETS
from accessory.model.families import FAMILIES
from accessory.optim import BETAS, LR_SCHEDULES, OPTIMIZERS
from accessory.quant import STORAGES

Config = TypeVar("Config", bound=BaseModel)
LOOPBACK = ("127.0.0.1", "localhost")
"""Hosts that only this machine reaches."""
_UNITS = {"": 10**9, "GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
"""A number and its unit."""
_QUANT_OF_BITS = {"4": {"quant": True}, "8": {"quant": True, "quant_type": "int8"}}
_OPTIMIZERS_OF_TRAINER = {"paged_adamw_32bit": "paged_adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw"}
TRACKERS = ("tensorboard", "wandb", "none")
"""What `--report_to` takes."""
_LAYER_WORDS = ("none", "all", "auto")
_TRAINED = ", ".join(f"with `{m.suffix}` {m.summary}" if m.suffix else f"alone {m.summary}" for m in METHODS.values())


def _layers(value: Any) -> Any:
    """`none`, `all`, `auto` or a number; a bool is the bare flag, as upstream's scripts give it."""
    if isinstance(value, bool):
        return "all" if value else "none"
    if value in _LAYER_WORDS or (isinstance(value, int) and value >= 0):
        return value
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    raise PydanticCustomError("layers", "Input should be 'none', 'all', 'auto' or a number of layers")


def _size(value: Any) -> Any:
    """A size in memory as it was written; a plain number is GB."""
    if value is None or isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(str(value))
    if not match or match[2].upper() not in _UNITS or not float(match[1]):
        raise PydanticCustomError(
            "size", "expected a size above 0 such as 24GB, 22GiB or 80000MB; a plain number is GB"
        )
    return str(value)


def _own_optimizer(value: Any) -> Any:
    """Our name of an optimizer that transformers' Trainer, and so qlora, calls otherwise."""
    return _OPTIMIZERS_OF_TRAINER.get(value, value) if isinstance(value, str) else value


Layers = Annotated[int | Literal[_LAYER_WORDS], BeforeValidator(_layers)]


def _listed(value: Any) -> Any:
    """One path as a list of it."""
    return [value] if isinstance(value, str | Path) else value


def _words(value: Any) -> Any:
    """Words apart, which may be separated by commas."""
    given = [value] if isinstance(value, str) else value
    return [word for text in given for word in text.split(",") if word] if isinstance(given, list) else given


class FinetuneConfig(BaseModel):
    """Fine-tune a language model: a frozen (optionally 4-bit) base and a small trained part, or all of it."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False)

    pretrained_path: list[Path] = Field(min_length=1)
    """Base first, then trained parts, in any format of docs/checkpoints.md."""
    data_config: Annotated[list[Path], BeforeValidator(_listed)] = Field(min_length=1)
    """What to train on: YAML files with META entries, data files, directories, patterns, or names (docs/data.md)."""
    data_dir: Path = DATA_DIR
    """Where data sets of known names (alpaca, oasst1, dolly, ...) lie, and files that are found nowhere else."""
    output_dir: Path | None = Path("./output_dir")
    """Where checkpoints, TensorBoard events, log and loss curve go; an empty value writes nothing."""
    llama_type: str = Field("llama", description=f"Family ({', '.join(FAMILIES)}) and what is trained: {_TRAINED}.")
    llama_config: list[Path] = []
    """JSON files of settings (also a model's config.json), laid over the checkpoint's own; the last value wins."""
    tokenizer_path: Path | None = None
    """tokenizer.model, tokenizer.json, a GGUF file, or a directory holding one; absent: what lies in the base."""
    new_tokens: list[str] = []
    """Tokens to add to the vocabulary, matched in text; their rows start as the mean of the others."""
    pretrained_type: Literal["consolidated", "meta_ori"] | None = None
    """Needless: the format is recognised from the files. Accepted for upstream's scripts."""
    quant: bool = False
    """Keep the linears of all blocks packed (--quant_type); embedding, head and norms stay in the compute precision."""
    quant_type: Literal[tuple(STORAGES)] | None = Field(
        None, description=f"Format of --quant (see docs/memory.md): {', '.join(STORAGES)}; absent: nf4."
    )
    quant_targets: list[Literal[QUANT_TARGETS]] = Field(
        [],
        description=f"Linears that --quant packs: those without LoRA (frozen), those with it (lora), or by name, of "
        f"{', '.join(QUANT_TARGETS)}; absent: all.",
    )
    bits: Annotated[Literal["4", "8", "16"], BeforeValidator(str)] | None = None
    """Another way to say --quant: 4 is --quant, 8 is --quant --quant_type int8, 16 is neither."""
    lora_r: int | None = Field(default=None, ge=1)
    """LoRA's rank: "lora_rank" of --llama_config, without a file (_peft)."""
    lora_alpha: float | None = None
    """LoRA's scale is this / --lora_r: "lora_alpha" of --llama_config, without a file (_peft)."""
    lora_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout on LoRA's input: "lora_dropout" of --llama_config, without a file (_peft)."""
    only_save_trainable: bool = False
    """Save only what is trained; needed with --quant."""
    precision: Literal["bf16", "fp16", "fp32", "tf32"] = "bf16"
    """Compute precision; what is trained is always kept in fp32. tf32 is fp32 with TF32 matrix products on CUDA."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes CUDA where there is any."""
    batch_size: int = Field(default=16, ge=1)
    """Documents of a micro-batch, per data-parallel rank."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Cut a step into micro-batches of at most this many tokens instead; what a global batch holds stays the same."""
    accum_iter: int = Field(default=4, ge=1)
    """Micro-batches per optimizer step; a global batch is batch_size x accum_iter x data-parallel ranks."""
    epochs: int = Field(default=3, ge=1)
    """Passes over the data."""
    warmup_epochs: float = Field(default_factory=lambda given: min(given["epochs"] / 10, 1.0), ge=0)
    """Linear warm-up of the learning rate, in (fractional) epochs; absent: a tenth of --epochs, at most 1."""
    val_data: Annotated[list[Path], BeforeValidator(_listed)] = []
    """What to evaluate on, given as --data_config is; it is not trained on."""
    val_split: float | None = Field(default=None, gt=0, lt=1)
    """Evaluate on this share of the training data instead, which is held out: the same records whatever the run."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Evaluate after every this many optimizer steps; also before the first and after the last."""
    eval_epochs: float | None = Field(default=None, gt=0)
    """Evaluate after every this many (fractional) epochs instead; absent, and without --eval_steps: 1."""
    patience: int | None = Field(default=None, ge=1)
    """End the run after this many evaluations in a row without a lower validation loss."""
    sample_prompts: list[str] = []
    """Questions to answer at each evaluation, or a file of them: a question a line (.txt), a list of texts (.json)."""
    sample_tokens: int = Field(default=128, ge=1)
    """Longest answer to one of --sample_prompts, in tokens."""
    mmlu: Path | None = None
    """A file of MMLU as qlora keeps it, lines of subject, input and output: its accuracy at each evaluation."""
    max_mmlu_samples: int | None = Field(default=None, ge=1)
    """Ask so many questions of --mmlu, spread over its subjects; absent: all."""
    report_to: Annotated[list[Literal[TRACKERS]], BeforeValidator(_words)] = ["tensorboard"]
    """Where figures go beside log.jsonl: tensorboard, wandb, several (tensorboard,wandb), or none."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps; the schedule still follows --epochs."""
    lr: float = Field(default=0.001, gt=0)
    """Highest learning rate."""
    min_lr: float = Field(default_factory=lambda given: given["lr"] / 10, ge=0)
    """Learning rate at the end of the cosine; absent: a tenth of --lr."""
    lr_schedule: Literal[LR_SCHEDULES] = "cosine"
    """After the warm-up: fall from --lr to --min_lr along a cosine, or stay at --lr (constant)."""
    weight_decay: float = Field(default=0.02, ge=0)
    """AdamW's decay; biases and norms are spared."""
    optim: Annotated[Literal[OPTIMIZERS], BeforeValidator(_own_optimizer)] = "adamw"
    """AdamW with moments in fp32 (adamw), in 8 bits (adamw8bit), or in memory a full GPU pages out (paged_adamw)."""
    adam_beta2: float = Field(default=BETAS[1], ge=0, lt=1)
    """Decay of AdamW's second moment; the first one's is 0.9."""
    clip_grad: float = -1.0
    """Clip the norm of the whole gradient to this; 0 or less only reports it."""
    max_words: int = Field(default=1024, ge=2)
    """Longest document in tokens; the rest is cut off and counted."""
    prompt_loss_weight: float = Field(default=0.0, ge=0, le=1)
    """Weight in the loss of tokens that are not to be learned; answers' is 1. The sum is divided by that of weights."""
    embed_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the embeddings' values that are dropped while training."""
    attn_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of attention's weights that are dropped while training; slower, for no fused kernel can do it."""
    max_skipped: float = Field(default=0.1, ge=0, le=1)
    """Largest share of records that may be unusable, 0 for none; beyond it the run does not start."""
    dialog: bool = False
    """Lay the data out as dialogues (### Human:, ### Assistant:), but for those with prompt_type chat."""
    mask_history: bool = False
    """Learn only the last answer of a conversation."""
    train_on_source: bool = False
    """Learn questions, too, and not only answers."""
    source_max_len: int | None = Field(default=None, ge=1)
    """Longest source (what stands before the first learned token), cut by itself before --max_words cuts all."""
    target_max_len: int | None = Field(default=None, ge=1)
    """Longest target (what the source leaves), cut by itself in the same way."""
    group_by_length: bool = False
    """Put documents of about one length into a step; the order of the steps stays random."""
    checkpointing: Layers = Field(default="none", json_schema_extra={"bare": "all"})
    """Layers to recompute in the backward: none, a number, all (also without a value), or auto: the fewest that fit."""
    offload_inputs: bool = False
    """Keep the inputs of recomputed layers in host memory until the backward (CUDA)."""
    max_memory: Annotated[str | None, BeforeValidator(_size)] = None
    """Most memory that the plan may take on a device, such as 24GB or 22GiB; a plain number is GB."""
    compile: bool = False
    """Compile norms, gates and rotations (torch.compile) where no Triton kernel runs; needs a C++ compiler."""
    model_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share one copy of the model (tensor parallel)."""
    data_parallel: Literal["sdp", "fsdp"] = "sdp"
    """sdp: base whole on every rank, gradients and optimizer sharded; fsdp: the base is sharded too."""
    save_interval: int = Field(default=1, ge=1)
    """Save after every this many epochs, and after the last."""
    save_iteration_interval: int = Field(default=5000, ge=1)
    """Save within an epoch after every this many micro-batches."""
    save_steps: int | None = Field(default=None, ge=1)
    """Save within an epoch after every this many optimizer steps instead."""
    save_minutes: float | None = Field(default=None, gt=0)
    """Save whenever this many minutes have passed since the last save, too."""
    keep_last: int | None = Field(default=None, ge=FEWEST)
    """Keep this many of the newest whole checkpoints, and the best (by validation, else training loss); absent: all."""
    overwrite: bool = False
    """Remove checkpoints in --output_dir that are further than where this run begins; without it they end the run."""
    resume: Path | None = None
    """Checkpoint directory of an earlier run to go on from; `latest`: the newest in --output_dir that is whole."""
    allow_changed: list[Literal[tuple(sorted(CHANGEABLE))]] = []
    """What may differ from the saved run on --resume: base, data, lr, ...; where anything else does, it is refused."""
    not_finite: Literal["stop", "skip"] = "stop"
    """If a loss or gradient is not finite: end the run, or skip the step; in fp16 a smaller loss scale comes first."""
    timeout: float = Field(default=600, gt=0)
    """Seconds that a process waits for the others, once training has begun, before it ends the run."""
    seed: int = Field(default=0, ge=0)
    """Seed of the data order, the added parameters and dropout."""
    dry_run: bool = False
    """Check everything, print the memory plan, run one true step, write nothing."""
    num_workers: int = Field(default=2, ge=0)
    """Threads that tokenize."""
    cache_ann_on_disk: bool = False
    """Keep tokenized data in ./accessory_data_cache and map it from there."""
    cache_base: Path | None = None
    """Keep what the base computes for each document in this directory, to train later epochs from it (_qst)."""
    cache_base_rows: Literal["exact", "int8"] = "exact"
    """How --cache_base keeps it: as computed (exact), or in 8 bits with a scale for each 64 numbers (int8)."""
    pin_mem: bool = True
    """Copy batches to the GPU from pinned memory."""
    dist_on_itp: bool = False
    """Take rank and world size from OpenMPI's variables."""
    no_visual: bool = False
    """Needless: there is no vision part yet. Accepted for upstream's scripts."""
    image_transform: Literal["random_resized_crop", "resized_center_crop", "padded_resize"] = "random_resized_crop"
    """Needless: there is no vision part yet. Accepted for upstream's scripts."""

    @model_validator(mode="before")
    @classmethod
    def _from_python(cls, given: Any) -> Any:
        """One value where several may stand is a list of it. Raises `ConfigError` for unknown keys, naming ours."""
        flags = [f"--{name}" for name in cls.model_fields]
        if faults := [f"FinetuneConfig: unknown key {key!r}{unknown(key, cls.model_fields, flags)}"
                      for key in given if key not in cls.model_fields]:  # fmt: skip
            raise ConfigError("\n".join(faults))
        several = {name for name, field in cls.model_fields.items() if get_origin(field.annotation) is list}
        given = {k: [v] if k in several and isinstance(v, str | Path) else v for k, v in given.items()}
        return _QUANT_OF_BITS.get(str(given.get("bits")), {}) | given

    def check(self) -> None:
        """Raise `ConfigError` with all `faults`."""
        if faults := self.faults():
            raise ConfigError("\n".join(faults), common=True)

    def faults(self) -> list[str]:
        """Combinations that cannot work, and files that are not there; empty where all is well."""
        found = []
        if self.quant and not self.only_save_trainable:
            found.append("--quant needs --only_save_trainable: a 4-bit base is never written with the trained part.")
        if self.quant_type and not self.quant:
            found.append(f"--quant_type {self.quant_type} without --quant changes nothing: give both, or neither.")
        if self.quant_targets and not self.quant:
            found.append("--quant_targets without --quant changes nothing: give both, or neither.")
        found += self._bits_faults()
        if self.min_lr > self.lr:
            found.append(f"--min_lr {self.min_lr} is above --lr {self.lr}.")
        if self.lr_schedule == "constant" and "min_lr" in self.model_fields_set:
            found.append(f"--min_lr {self.min_lr} with --lr_schedule constant changes nothing: leave one out.")
        if self.offload_inputs and self.checkpointing in ("none", 0):
            found.append("--offload_inputs needs --checkpointing: it moves the inputs of the layers recomputed.")
        if self.cache_base and self.cache_base == self.output_dir:
            found.append(f"--cache_base {self.cache_base} is the --output_dir: give a directory of its own.")
        found += self._evaluation_faults()
        found += misplaced_files(
            pretrained_path=self.pretrained_path,
            llama_config=self.llama_config,
            tokenizer_path=[self.tokenizer_path],
            resume=[None if self.resumes_latest else self.resume],
        )
        for flag, given in (("data_config", self.data_config), ("val_data", self.val_data)):
            found += missing_data(flag, given, self.data_dir)
        if self.resumes_latest and self.output_dir is None:
            found.append("--resume latest needs an --output_dir, which it looks into.")
        return found

    def _bits_faults(self) -> list[str]:
        packed = {"4": [4], "8": [8], "16": []}.get(self.bits or "", [4, 8])
        if self.quant and not packed:
            return [f"--bits {self.bits} contradicts --quant: leave one out."]
        if self.bits and packed and not self.quant:
            return [f"--bits {self.bits} contradicts quant False: leave one out."]
        if self.bits and self.quant_type and STORAGES[self.quant_type].bits not in packed:
            return [f"--bits {self.bits} contradicts --quant_type {self.quant_type}: leave one out."]
        return []

    @property
    def drops_out(self) -> bool:
        """Whether equal tokens of two documents give different results in the base, too."""
        return self.embed_dropout > 0 or self.attn_dropout > 0

    @property
    def flag_settings(self) -> dict[str, tuple[str, Any]]:
        """Settings of a method that were given as flags: key -> (flag, value)."""
        flags = {"lora_rank": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
        given = {key: (f"--{flag}", getattr(self, flag)) for key, flag in flags.items()}
        return {key: stated for key, stated in given.items() if stated[1] is not None}

    @property
    def max_memory_bytes(self) -> int | None:
        """`--max_memory` in bytes."""
        match = _SIZE.fullmatch(self.max_memory or "")
        return int(float(match[1]) * _UNITS[match[2].upper()]) if match else None

    def _evaluation_faults(self) -> list[str]:
        found = []
        if self.val_data and self.val_split:
            found.append("--val_data and --val_split contradict each other: leave one out.")
        if self.eval_steps and self.eval_epochs:
            found.append("--eval_steps and --eval_epochs contradict each other: leave one out.")
        if not self.evaluates:
            for name in ("eval_steps", "eval_epochs", "patience", "sample_prompts", "mmlu"):
                if getattr(self, name):
                    found.append(f"--{name} needs documents to evaluate on: give --val_data FILE or --val_split 0.02.")
        if self.max_mmlu_samples and not self.mmlu:
            found.append("--max_mmlu_samples needs --mmlu FILE.")
        if "none" in self.report_to and len(self.report_to) > 1:
            found.append(f"--report_to {','.join(self.report_to)}: none goes with nothing else.")
        if "wandb" in self.report_to and importlib.util.find_spec("wandb") is None:
            found.append("--report_to wandb: wandb is not installed. Install it with: pip install -e '.[wandb]'")
        return found

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates anything."""
        return bool(self.val_data) or self.val_split is not None

    @property
    def resumes_latest(self) -> bool:
        """Whether to resume from the newest whole checkpoint in `--output_dir`."""
        return self.resume == Path("latest")


class AskConfig(BaseModel):
    """What every demo takes: the model and how it answers."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False)

    pretrained_path: list[Path] = Field(min_length=1)
    """Base, then trained parts; or a trained part alone, whose run.json knows its base."""
    llama_type: str | None = None
    """Family and method; absent: what the checkpoint says."""
    llama_config: list[Path] = []
    """JSON files of settings, laid over the checkpoint's own."""
    tokenizer_path: Path | None = None
    """Tokenizer; absent: what lies in the checkpoint."""
    max_seq_len: int = Field(default=4096, ge=2)
    """Longest prompt and answer together, in tokens."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes CUDA where there is any."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Compute precision."""
    quant: bool | None = None
    """Keep the base packed; absent: as the trained part was trained."""
    quant_type: Literal[tuple(STORAGES)] | None = None
    """Format of the packed base; absent: as trained, or nf4."""
    max_gen_len: int = Field(default=128, ge=1)
    """Longest answer, in tokens."""
    temperature: float = Field(default=0.1, ge=0)
    """0 always takes the likeliest token."""
    top_p: float = Field(default=0.75, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many of the likeliest tokens; 0: from all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Sample from tokens that are at least this many times as likely as the likeliest one."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1 makes tokens less likely that stand in the prompt or the answer so far."""
    stop: list[str] = []
    """Texts that end an answer, and are not shown."""
    seed: int = 0
    """Seed of the sampling."""
    dist_on_itp: bool = False
    """Take rank and world size from OpenMPI's variables."""
    n_gpus: int | None = Field(default=None, ge=1)
    """Start this many processes that share the model, each on a GPU (or on the CPU), where no torchrun does."""
    gpu_ids: list[Annotated[int, Field(ge=0)]] = []
    """Start a process on each of these GPUs."""

    @property
    def own_ranks(self) -> list[int]:
        """The GPU of each process to start; none where they are not asked for."""
        return self.gpu_ids or list(range(self.n_gpus or 0))

    def faults(self) -> list[str]:
        """Combinations that cannot work, and files that are not there; empty where all is well."""
        found = misplaced_files(
            pretrained_path=self.pretrained_path, llama_config=self.llama_config, tokenizer_path=[self.tokenizer_path]
        )
        if self.quant is False and self.quant_type:
            found.append(f"--quant_type {self.quant_type} contradicts --no_quant: leave one out.")
        if self.gpu_ids and self.n_gpus not in (None, len(self.gpu_ids)):
            found.append(f"--n_gpus {self.n_gpus} contradicts --gpu_ids, which are {len(self.gpu_ids)}: leave one out.")
        if len(set(self.gpu_ids)) < len(self.gpu_ids):
            found.append(f"--gpu_ids {' '.join(map(str, self.gpu_ids))}: names a GPU twice.")
        return found


class PageConfig(AskConfig):
    """What a demo with a page takes, too."""

    host: str = "127.0.0.1"
    """Address the page is served at; another than loopback needs --password."""
    port: int = Field(default=7860, ge=1, le=65535)
    """Port of the page."""
    password: str | None = None
    """Password of the page (user name: accessory)."""

    def faults(self) -> list[str]:
        """Those of `AskConfig`, and a page that strangers would reach."""
        found = super().faults()
        if ":" in self.host:
            found.append(
                f"--host {self.host}: expected a name or an IPv4 address; the page's library takes no IPv6 one."
            )
        elif self.host not in LOOPBACK and not self.password:
            found.append(f"--host {self.host} lets others reach the page: give a --password.")
        return found


class DemoConfig(PageConfig):
    """Ask a base model, or a base with a trained part, single questions."""

    prompt: list[str] = []
    """Questions to answer in the terminal; without any, a page is served."""
    system_prompt: Literal[PROMPT_LAYOUTS] | None = None
    """Prompt layout; absent: that of the training data; for a base its chat template, or alpaca."""


class TalkConfig(AskConfig):
    """What a demo takes that remembers what was said, too."""

    max_gen_len: int = Field(default=512, ge=1)
    """Longest answer, in tokens."""
    system: str | None = None
    """Words of the system before the first turn; absent: those of the training data, or of the prompt layout."""
    system_prompt: Literal[PROMPT_LAYOUTS] | None = None
    """Prompt layout; absent: that of the training data; for a base its chat template, or dialog."""


class TerminalConfig(TalkConfig):
    """Talk with a base model, or a base with a trained part, in the terminal."""

    prompt: list[str] = []
    """Ask these one after the other, and read nothing from the terminal."""


class ChatPageConfig(TalkConfig, PageConfig):
    """Talk with a base model, or a base with a trained part, on a page that remembers what was said."""

    kept_caches: int = Field(default=4, ge=1)
    """Conversations whose keys and values stay in memory; those of others are computed anew when they go on."""


def misplaced_files(llama_config: list[Path], **flags: list[Path | None]) -> list[str]:
    """One fault for each given path that does not exist, or is a directory where a file is expected, by flag name."""
    found = [
        f"--{flag} {path}: no such file or directory.{hub_hint(path) or tree_hint(path)}"
        for flag, paths in {"llama_config": llama_config, **flags}.items()
        for path in paths
        if path is not None and not is_there(path)
    ]
    directories = [path for path in llama_config if is_there(path) and path.is_dir()]
    return found + [f"--llama_config {path}: is a directory; expected a JSON file." for path in directories]


def tree_hint(path: Path) -> str:
    """Where a missing path lies that is spelled from the root of the repository, as `configs/...`; else empty."""
    root = Path(__file__).resolve().parents[1]
    there = not path.is_absolute() and path.parts and is_there(root / path)
    return f" There is {root / path}: give that, or start in {root}." if there else ""


def missing_data(flag: str, given: list[Path], data_dir: Path) -> list[str]:
    """One fault for each value of `flag` that names nothing."""
    found = []
    for path in given:
        try:
            if not is_there(path):
                find_files(str(path), [Path()], data_dir)
        except DataError as error:
            found.append(f"--{flag} {str(error).removeprefix('path ')}{tree_hint(path)}")
    return found


def parse(config_class: type[Config], arguments: list[str]) -> Config:
    """Flags -> a config. Raises `ConfigError` listing every fault, each with the nearest valid name."""
    parser = _parser(config_class)
    known, strange = parser.parse_known_args(arguments)
    faults = _unknown_words(strange, arguments, config_class)
    values = {name: value for name, value in vars(known).items() if value is not argparse.SUPPRESS}
    required = [name for name, field in config_class.model_fields.items() if field.is_required()]
    for name, value in values.items():
        if value == "" and name not in required:
            values[name] = None
        elif value == "" or (isinstance(value, list) and "" in value):
            faults.append(f"--{name} '': expected a value; is a variable of the shell empty?")
    config = None
    try:
        config = config_class(**values)
    except ValidationError as error:
        found = explain_validation(error, "flags", config_class.model_fields)
        faults += [line.replace("flags: '", "--", 1).replace("'", "", 1) for line in found.splitlines()]
    if config is not None:
        faults += config.faults()
    if faults:
        raise ConfigError("\n".join(faults), common=True)
    return config


def _unknown_words(words: list[str], arguments: list[str], config_class: type[BaseModel]) -> list[str]:
    """One fault for each unknown flag, and for each word that follows none."""
    flags = [f"--{name}" for name in config_class.model_fields]
    switches = [f"--{name}" for name, field in config_class.model_fields.items() if _is_switch(field)]
    faults, after_flag = [], False
    for word in words:
        if word.startswith("-"):
            name = word.split("=")[0]
            faults.append(f"Unknown flag {name}{unknown(name, flags, flags)}")
            after_flag = True
        elif not after_flag:
            before = arguments[arguments.index(word) - 1]
            why = ": flags are written --name value" if "=" in word else ""
            why = f": {before} is a switch and takes no value" if before in switches else why
            faults.append(f"{word!r} belongs to no flag{why}.")
    return faults


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """Raise our error instead of leaving the process from every rank."""
        message = message.replace("ignored explicit argument", "is a switch and takes no value; found")
        raise ConfigError(message[0].upper() + message[1:] + ".", common=True)


def _parser(config_class: type[BaseModel]) -> argparse.ArgumentParser:
    parser = _Parser(description=config_class.__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, field in config_class.model_fields.items():
        options: dict[str, Any] = {"help": (field.description or "").replace("%", "%%") + _default_text(field)}
        if _is_switch(field):
            if field.default is not False:
                parser.add_argument(f"--no_{name}", dest=name, action="store_false", help=f"Not --{name}.")
            options["action"] = "store_true"
        elif get_origin(field.annotation) is list:
            options["nargs"] = "+" if field.is_required() else "*"
        elif bare := (field.json_schema_extra or {}).get("bare"):
            options |= {"nargs": "?", "const": bare}
        parser.add_argument(f"--{name}", **options)
    return parser


def _is_switch(field: FieldInfo) -> bool:
    return bool in (field.annotation, *get_args(field.annotation))


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return " Required."
    default = ",".join(field.default) if isinstance(field.default, list) else field.default
    return "" if field.default_factory or default in (None, False, "") else f" Default: {default}."


def plain(config: BaseModel) -> dict[str, Any]:
    """A config as JSON-ready values."""
    return json.loads(config.model_dump_json())
