"""Every flag of fine-tuning. The string under a field is its `--help` and its row in docs/flags.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from accessory.checkpoint.training_state import CHANGEABLE
from accessory.config.files import misplaced_files, missing_data
from accessory.config.running import RunConfig
from accessory.config.values import Paths
from accessory.data.finding import DATA_DIR
from accessory.method import METHODS, QUANT_TARGETS
from accessory.model.families import FAMILIES
from accessory.optim import LR_SCHEDULES
from accessory.quant import QUANT_TYPES, STORAGES, storage

_QUANT_OF_BITS = {"4": {"quant": True}, "8": {"quant": True, "quant_type": "int8"}}
_OF_TEACHER = ("teacher_quant_type", "teacher_temperature", "teacher_weight")
_TRAINED = ", ".join(f"with `{m.suffix}` {m.summary}" if m.suffix else f"alone {m.summary}" for m in METHODS.values())


class FinetuneConfig(RunConfig):
    """Fine-tune a language model: a frozen (optionally 4-bit) base and a small trained part, or all of it."""

    pretrained_path: list[Path] = Field(min_length=1)
    """Base first, then trained parts, in any format of docs/checkpoints.md."""
    data_config: Paths = Field(min_length=1)
    """What to train on: YAML files with META entries, data files, directories, patterns, or names (docs/data.md)."""
    data_dir: Path = DATA_DIR
    """Where data sets of known names (alpaca, oasst1, dolly, ...) lie, and files that are found nowhere else."""
    llama_type: str = Field("llama", description=f"Family ({', '.join(FAMILIES)}) and what is trained: {_TRAINED}.")
    new_tokens: list[str] = Field([])
    """Tokens to add to the vocabulary, matched in text; their rows start as the mean of the others."""
    quant: bool = False
    """Keep the linears of all blocks packed (--quant_type); embedding, head and norms stay in the compute precision."""
    quant_type: Literal[QUANT_TYPES] | None = Field(
        None, description=f"Format of --quant (see docs/memory.md): {', '.join(QUANT_TYPES)}; absent: nf4."
    )
    quant_targets: list[Literal[QUANT_TARGETS]] = Field(
        [],
        description=f"Linears that --quant packs: those without LoRA (frozen), those with it (lora), or by name, of "
        f"{', '.join(QUANT_TARGETS)}; absent: all.",
    )
    bits: Annotated[Literal["4", "8", "16"], BeforeValidator(str)] | None = None
    """Another way to say --quant: 4 is --quant, 8 is --quant --quant_type int8, 16 is neither."""
    lora_r: int | None = Field(default=None, ge=1)
    """LoRA's rank (_peft), as "lora_rank" of --llama_config; norms and biases are then trained only if that says so."""
    lora_alpha: float | None = None
    """LoRA's scale is this / --lora_r: "lora_alpha" of --llama_config, without a file (_peft)."""
    lora_dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout on LoRA's input: "lora_dropout" of --llama_config, without a file (_peft)."""
    only_save_trainable: bool = False
    """Save only what is trained; needed with --quant."""
    batch_size: int = Field(default=16, ge=1)
    """Documents of a micro-batch, per data-parallel rank."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Cut a step into micro-batches of at most this many tokens instead; what a global batch holds stays the same."""
    epochs: int = Field(default=3, ge=1)
    """Passes over the data."""
    warmup_epochs: float = Field(default_factory=lambda given: min(given["epochs"] / 10, 1.0), ge=0)
    """Linear warm-up of the learning rate, in (fractional) epochs; absent: a tenth of --epochs, at most 1."""
    val_data: Paths = Field([])
    """What to evaluate on, given as --data_config is; it is not trained on."""
    val_split: float | None = Field(default=None, gt=0, lt=1)
    """Evaluate on this share of the training data instead, which is held out: the same records whatever the run."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Evaluate after every this many optimizer steps; also before the first and after the last."""
    eval_epochs: float | None = Field(default=None, gt=0)
    """Evaluate after every this many (fractional) epochs instead; absent, and without --eval_steps: 1."""
    sample_prompts: list[str] = Field([])
    """Questions to answer at each evaluation, or a file of them: a question a line (.txt), a list of texts (.json)."""
    sample_tokens: int = Field(default=128, ge=1)
    """Longest answer to one of --sample_prompts, in tokens."""
    mmlu: Path | None = None
    """A file of MMLU as qlora keeps it, lines of subject, input and output: its accuracy at each evaluation."""
    max_mmlu_samples: int | None = Field(default=None, ge=1)
    """Ask so many questions of --mmlu, spread over its subjects; absent: all."""
    lr_schedule: Literal[LR_SCHEDULES] = "cosine"
    """After the warm-up: fall from --lr to --min_lr along a cosine, or stay at --lr (constant)."""
    max_words: int = Field(default=1024, ge=2)
    """Longest document in tokens; the rest is cut off and counted."""
    prompt_loss_weight: float = Field(default=0.0, ge=0, le=1)
    """Weight in the loss of tokens that are not to be learned; answers' is 1. The sum is divided by that of weights."""
    teacher: Paths = Field([])
    """Learn from this model, too: any checkpoint with the same vocabulary, or `base`, the base in full precision."""
    teacher_weight: float = Field(default=0.5, gt=0, le=1)
    """Share of the loss that is the divergence from the teacher; the rest is cross-entropy."""
    teacher_temperature: float = Field(default=1.0, gt=0)
    """Logits of both are divided by this in the divergence, which is multiplied by its square."""
    teacher_quant_type: Literal[tuple(STORAGES)] | None = None
    """Pack the teacher in this format of --quant_type; absent: keep it as its files have it."""
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
    save_interval: int = Field(default=1, ge=1)
    """Save after every this many epochs, and after the last."""
    save_iteration_interval: int = Field(default=5000, ge=1)
    """Save within an epoch after every this many micro-batches."""
    save_steps: int | None = Field(default=None, ge=1)
    """Save within an epoch after every this many optimizer steps instead."""
    allow_changed: list[Literal[tuple(sorted(CHANGEABLE))]] = Field([])
    """What may differ from the saved run on --resume: base, data, lr, ...; where anything else does, it is refused."""
    num_workers: int = Field(default=2, ge=0)
    """Threads that tokenize, and read images."""
    cache_ann_on_disk: bool = False
    """Keep tokenized data in ./accessory_data_cache and map it from there."""
    cache_base: Path | None = None
    """Keep what the base computes for each document in this directory, to train later epochs from it (_qst)."""
    cache_base_rows: Literal["exact", "int8"] = "exact"
    """How --cache_base keeps it: as computed (exact), or in 8 bits with a scale for each 64 numbers (int8)."""
    vision_path: Path | None = None
    """A Hugging Face directory of BLIP-2 or CLIP, for the image encoder; absent: the checkpoint's own, if any."""
    no_visual: bool = False
    """Leave out the image encoder that the checkpoint has, and the images of records."""
    image_transform: Literal["random_resized_crop", "resized_center_crop", "padded_resize"] = "random_resized_crop"
    """How an image becomes a square: a random part of it, another in each epoch, its centre, or all of it."""
    cache_features: Path | None = None
    """Keep what the image encoder makes of each image in this directory, for later epochs and runs."""

    @classmethod
    def _implied(cls, given: dict[str, Any]) -> dict[str, Any]:
        return _QUANT_OF_BITS.get(str(given.get("bits")), {})

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
        if self.lr_schedule == "constant" and "min_lr" in self.model_fields_set and self.min_lr != self.lr / 10:
            found.append(f"--min_lr {self.min_lr} with --lr_schedule constant changes nothing: leave one out.")
        if self.cache_base and self.cache_base == self.output_dir:
            found.append(f"--cache_base {self.cache_base} is the --output_dir: give a directory of its own.")
        found += self._evaluation_faults()
        found += self._vision_faults()
        found += [f"--{name} without --teacher changes nothing: give both, or neither."
                  for name in _OF_TEACHER
                  if not self.teacher and getattr(self, name) != type(self).model_fields[name].default]  # fmt: skip
        found += misplaced_files(
            pretrained_path=self.pretrained_path,
            teacher=[] if self.teaches_base else self.teacher,
            vision_path=[self.vision_path],
        )
        found += super().faults()
        for flag, given in (("data_config", self.data_config), ("val_data", self.val_data)):
            found += missing_data(flag, given, self.data_dir)
        return found

    def _bits_faults(self) -> list[str]:
        packed = {"4": [4], "8": [8], "16": []}.get(self.bits or "", [4, 8])
        if self.quant and not packed:
            return [f"--bits {self.bits} contradicts --quant: leave one out."]
        if self.bits and packed and not self.quant:
            return [f"--bits {self.bits} contradicts quant False: leave one out."]
        if self.bits and self.quant_type and storage(self.quant_type).bits not in packed:
            return [f"--bits {self.bits} contradicts --quant_type {self.quant_type}: leave one out."]
        return []

    def _vision_faults(self) -> list[str]:
        found = [f"--{name} {value} contradicts --no_visual: leave one out."
                 for name in ("vision_path", "cache_features")
                 if self.no_visual and (value := getattr(self, name))]  # fmt: skip
        if self.cache_features and self.image_transform == "random_resized_crop":
            found.append(
                f"--cache_features {self.cache_features} with --image_transform random_resized_crop: each epoch has "
                "other crops, so nothing would be used again. Give resized_center_crop or padded_resize."
            )
        if self.cache_features and self.cache_features in (self.output_dir, self.cache_base):
            found.append(f"--cache_features {self.cache_features} is another flag's, too: give a directory of its own.")
        return found

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

    def _smaller_steps(self) -> list[str]:
        found = [
            "a smaller --max_words",
            "a smaller --batch_size" if self.max_tokens is None else "a smaller --max_tokens",
        ]
        return found + ([] if self.quant else ["--quant with a method that trains a small part"])

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
        return found

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates anything."""
        return bool(self.val_data) or self.val_split is not None

    @property
    def teaches_base(self) -> bool:
        """Whether `--teacher` is the run's own base in full precision."""
        return self.teacher == [Path("base")]
