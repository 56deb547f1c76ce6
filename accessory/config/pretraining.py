"""Every flag of pretraining. The string under a field is its `--help` and its row in docs/flags.md."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from accessory.checkpoint.training_state import CHANGEABLE_IN_PRETRAINING
from accessory.config.files import misplaced_files
from accessory.config.running import RunConfig
from accessory.config.values import Size, size_bytes
from accessory.data.raw.documents import KEYS, UNITS
from accessory.model.families import FAMILIES


class PretrainConfig(RunConfig):
    """Pretrain a language model on raw text: all its weights, from random ones or from a checkpoint's."""

    data_meta_path: Path
    """A JSON list of files to train on (.parquet, .jsonl, .txt), the last of which is evaluated on instead."""
    data_root: Path | None = None
    """Directory that the names in --data_meta_path are relative to; absent: the one it lies in."""
    packed_data: bool = False
    """The files are tokens that tools/pack_data.py wrote (.safetensors), and not text."""
    text_key: str | None = Field(
        None, description=f"Column of a .parquet, or key of a .jsonl, that holds the text; absent: {' or '.join(KEYS)}."
    )
    txt: Literal[UNITS] = UNITS[0]
    """What of a .txt is one document: the whole file, or each of its lines or paragraphs."""
    shuffle_buffer: Size = "1MB"
    """Text that each row of the global batch reads at a time, to shuffle its documents, such as 1MB."""
    attend_across: bool = False
    """Let tokens attend to the documents before theirs in a row, as upstream's packed data do."""
    max_skipped: float = Field(default=0.1, ge=0, le=1)
    """Largest share of documents that may be unusable, 0 for none; beyond it the run ends."""
    pretrained_path: list[Path] = Field([])
    """Checkpoint to begin from, in any format of docs/checkpoints.md; absent: random weights."""
    llama_type: str = Field("llama", description=f"Family of the model: {', '.join(FAMILIES)}.")
    batch_size: int = Field(default=4, ge=1)
    """Rows of a micro-batch, per data-parallel rank."""
    max_words: int = Field(default=2048, ge=2)
    """Tokens of a row: documents are joined, and cut into rows of so many."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the data; of text, how many steps a pass has is estimated from samples."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimizer steps; the learning rate follows --lr_decay_iters all the same."""
    warmup_iters: int = Field(default=20_000, ge=0)
    """Micro-batches of a rank over which the learning rate rises from 0 to --lr."""
    lr_decay_iters: int = Field(default=1_800_000, ge=1)
    """Micro-batches of a rank after which the learning rate is down at --min_lr, along a cosine."""
    eval_steps: int | None = Field(default=None, ge=1)
    """Evaluate after every this many optimizer steps; absent: after every 10,000 micro-batches of a rank."""
    val_rows: int | None = Field(default=1024, ge=1)
    """Evaluate on this many rows, the first of the validation file."""
    save_freq: int = Field(default=5000, ge=1)
    """Save after every this many micro-batches of a rank."""
    allow_changed: list[Literal[tuple(sorted(CHANGEABLE_IN_PRETRAINING))]] = Field([])
    """What may differ from the saved run on --resume: base, data, lr, ...; where anything else does, it is refused."""
    num_workers: int = Field(default=5, ge=0)
    """Threads that read and tokenize the next step while one is computed; 0: none, the step waits for its data."""

    def faults(self) -> list[str]:
        """Combinations that cannot work, and files that are not there; empty where all is well."""
        found = []
        if self.lr_decay_iters < self.warmup_iters:
            found.append(f"--lr_decay_iters {self.lr_decay_iters} is below --warmup_iters {self.warmup_iters}.")
        if not self.shuffle_bytes or self.shuffle_buffer[-1].isdigit():
            found.append(f"--shuffle_buffer {self.shuffle_buffer}: expected a byte or more, with a unit, such as 1MB.")
        if self.packed_data and self.text_key:
            found.append(f"--text_key {self.text_key}: --packed_data are tokens, which have no keys; leave one out.")
        if not self.pretrained_path and self.resume is None:
            needed = {"llama_config": self.llama_config, "tokenizer_path": self.tokenizer_path}
            found += [f"--{flag} is needed where there is no --pretrained_path." for flag, given in needed.items()
                      if not given]  # fmt: skip
        found += misplaced_files(
            pretrained_path=self.pretrained_path, data_meta_path=[self.data_meta_path], data_root=[self.data_root]
        )
        return found + super().faults()

    @property
    def shuffle_bytes(self) -> int:
        """`--shuffle_buffer` in bytes."""
        return size_bytes(self.shuffle_buffer)
