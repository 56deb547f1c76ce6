"""Flags that every training run takes. The string under a field is its `--help` and its row in docs/flags.md."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from accessory.checkpoint.run_checkpoints import FEWEST
from accessory.config.files import misplaced_files
from accessory.config.values import Layers, Size, own_optimizer, size_bytes, words
from accessory.errors import ConfigError
from accessory.foreign_names import unknown
from accessory.optim import BETAS, OPTIMIZERS

TRACKERS = ("tensorboard", "wandb", "none")
"""What `--report_to` takes."""


class RunConfig(BaseModel):
    """What fine-tuning and pretraining have in common: where, how fast and how long to train, and what to keep."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False)

    output_dir: Path | None = Path("./output_dir")
    """Where checkpoints, TensorBoard events, log and loss curve go; an empty value writes nothing."""
    llama_config: list[Path] = []
    """JSON files of settings (also a model's config.json), laid over the checkpoint's own; the last value wins."""
    tokenizer_path: Path | None = None
    """tokenizer.model, tokenizer.json, a GGUF file, or a directory holding one; absent: what lies in the base."""
    pretrained_type: Literal["consolidated", "meta_ori"] | None = None
    """Needless: the format is recognised from the files. Accepted for upstream's scripts."""
    precision: Literal["bf16", "fp16", "fp32", "tf32"] = "bf16"
    """Compute precision; what is trained is always kept in fp32. tf32 is fp32 with TF32 matrix products on CUDA."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes CUDA where there is any."""
    accum_iter: int = Field(default=4, ge=1)
    """Micro-batches per optimizer step; a global batch is batch_size x accum_iter x data-parallel ranks."""
    patience: int | None = Field(default=None, ge=1)
    """End the run after this many evaluations in a row without a lower validation loss."""
    report_to: Annotated[list[Literal[TRACKERS]], BeforeValidator(words)] = ["tensorboard"]
    """Where figures go beside log.jsonl: tensorboard, wandb, several (tensorboard,wandb), or none."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps; the schedule still follows --epochs."""
    lr: float = Field(default=0.001, gt=0)
    """Highest learning rate."""
    min_lr: float = Field(default_factory=lambda given: given["lr"] / 10, ge=0)
    """Learning rate at the end of the cosine; absent: a tenth of --lr."""
    weight_decay: float = Field(default=0.02, ge=0)
    """AdamW's decay; biases and norms are spared."""
    optim: Annotated[Literal[OPTIMIZERS], BeforeValidator(own_optimizer)] = "adamw"
    """AdamW with moments in fp32 (adamw), in 8 bits (adamw8bit), or in memory a full GPU pages out (paged_adamw)."""
    adam_beta2: float = Field(default=BETAS[1], ge=0, lt=1)
    """Decay of AdamW's second moment; the first one's is 0.9."""
    clip_grad: float = -1.0
    """Clip the norm of the whole gradient to this; 0 or less only reports it."""
    checkpointing: Layers = Field(default="none", json_schema_extra={"bare": "all"})
    """Layers to recompute in the backward: none, a number, all (also without a value), or auto: the fewest that fit."""
    offload_inputs: bool = False
    """Keep the inputs of recomputed layers in host memory until the backward (CUDA)."""
    max_memory: Size = None
    """Most memory that the plan may take on a device, such as 24GB or 22GiB; a plain number is GB."""
    compile: bool = False
    """Compile norms, gates and rotations (torch.compile) where no Triton kernel runs; needs a C++ compiler."""
    model_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share one copy of the model (tensor parallel)."""
    data_parallel: Literal["sdp", "fsdp"] = "sdp"
    """sdp: base whole on every rank, gradients and optimizer sharded; fsdp: the base is sharded too."""
    save_minutes: float | None = Field(default=None, gt=0)
    """Save whenever this many minutes have passed since the last save, too."""
    keep_last: int | None = Field(default=None, ge=FEWEST)
    """Keep this many of the newest whole checkpoints, and the best (by validation, else training loss); absent: all."""
    overwrite: bool = False
    """Remove checkpoints in --output_dir that are further than where this run begins; without it they end the run."""
    resume: Path | None = None
    """Checkpoint directory of an earlier run to go on from; `latest`: the newest in --output_dir that is whole."""
    not_finite: Literal["stop", "skip"] = "stop"
    """If a loss or gradient is not finite: end the run, or skip the step; in fp16 a smaller loss scale comes first."""
    timeout: float = Field(default=600, gt=0)
    """Seconds that a process waits for the others, once training has begun, before it ends the run."""
    seed: int = Field(default=0, ge=0)
    """Seed of the data order, the added parameters and dropout."""
    deterministic: bool = False
    """On CUDA: equal runs get equal bits, resumed ones too, in slower steps. A CPU does so anyway."""
    dry_run: bool = False
    """Check everything, print the memory plan, run one true step, write nothing."""
    pin_mem: bool = True
    """Copy batches to the GPU from pinned memory."""
    dist_on_itp: bool = False
    """Take rank and world size from OpenMPI's variables."""

    @model_validator(mode="before")
    @classmethod
    def _from_python(cls, given: Any) -> Any:
        """One value where several may stand is a list of it. Raises `ConfigError` for unknown keys, naming ours."""
        flags = [f"--{name}" for name in cls.model_fields]
        if faults := [f"{cls.__name__}: unknown key {key!r}{unknown(key, cls.model_fields, flags)}"
                      for key in given if key not in cls.model_fields]:  # fmt: skip
            raise ConfigError("\n".join(faults))
        several = {name for name, field in cls.model_fields.items() if get_origin(field.annotation) is list}
        given = {k: [v] if k in several and isinstance(v, str | Path) else v for k, v in given.items()}
        return cls._implied(given) | given

    @classmethod
    def _implied(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Values that follow from those `given` where they are not given themselves."""
        return {}

    def check(self) -> None:
        """Raise `ConfigError` with all `faults`."""
        if faults := self.faults():
            raise ConfigError("\n".join(faults), common=True)

    def faults(self) -> list[str]:
        """Combinations that cannot work, and files that are not there; empty where all is well."""
        found = []
        if self.min_lr > self.lr:
            found.append(f"--min_lr {self.min_lr} is above --lr {self.lr}.")
        if self.offload_inputs and self.checkpointing in ("none", 0):
            found.append("--offload_inputs needs --checkpointing: it moves the inputs of the layers recomputed.")
        if "none" in self.report_to and len(self.report_to) > 1:
            found.append(f"--report_to {','.join(self.report_to)}: none goes with nothing else.")
        if "wandb" in self.report_to and importlib.util.find_spec("wandb") is None:
            found.append("--report_to wandb: wandb is not installed. Install it with: pip install -e '.[wandb]'")
        found += misplaced_files(
            llama_config=self.llama_config,
            tokenizer_path=[self.tokenizer_path],
            resume=[None if self.resumes_latest else self.resume],
        )
        if self.resumes_latest and self.output_dir is None:
            found.append("--resume latest needs an --output_dir, which it looks into.")
        return found

    @property
    def remedies(self) -> str:
        """Flags that make a step smaller and are not used yet."""
        found = self._smaller_steps()
        found += [] if self.optim == "adamw8bit" else ["--optim adamw8bit"]
        found += [] if self.checkpointing in ("all", "auto") else ["--checkpointing"]
        found += [] if self.data_parallel == "fsdp" else ["--data_parallel fsdp on more ranks"]
        return ", ".join([*found, "--model_parallel_size on more ranks"])

    def _smaller_steps(self) -> list[str]:
        return ["a smaller --max_words", "a smaller --batch_size"]

    @property
    def max_memory_bytes(self) -> int | None:
        """`--max_memory` in bytes."""
        return size_bytes(self.max_memory)

    @property
    def resumes_latest(self) -> bool:
        """Whether to resume from the newest whole checkpoint in `--output_dir`."""
        return self.resume == Path("latest")
